"""The Triton kernels on the CPU, in Triton's interpreter, against the reference. `test_msa_triton.py` runs this file
in a process of its own, with TRITON_INTERPRET=1: kernels are made for the interpreter or for a GPU when they are
imported, and Triton's own library is when Triton is.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton.language as tl
from msa_cases import Case, random_blocks, relative
from triton.runtime import interpreter

from openm3.msa import reference, triton_backend, triton_tiles

BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = {torch.float32: 1e-5, BF16: 5e-3, FP16: 5e-3}
CHUNK = Case((2, 4, 1), (37, 40, 64), integers=True)
WHOLE = Case((9, 0, 5), (9, 7, 5), integers=True, block=2)
ODD = Case((5, 2), (50, 24), integers=True, block=12, d=20, di=3, group=3, hkv=4, topk=2)
FINE = CHUNK.but(block=1, topk=6)
DECODE = CHUNK.but(lens_q=(1, 1, 1), lens_k=(64, 9, 1))
EDGES = Case((1, 3, 4, 5), (1, 3, 4, 5), integers=True, block=4, topk=1)
BACKWARDS = Case((7,), (40,), integers=True, positions=tuple(range(39, -1, -6)))
TREE = Case((5, 3), (33, 17), integers=True, positions=(28, 29, 29, 30, 30, -1, 16, 15))
CASES = [CHUNK, WHOLE, ODD, FINE, DECODE, EDGES, BACKWARDS, TREE, CHUNK.but(topk=20), CHUNK.but(hi=1, hkv=4),
         CHUNK.but(topk=4, local=2, init=2), DECODE.but(topk=9, local=1, init=8)]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def an_interpreter_that_multiplies_bf16():
    """It holds bf16 as its bits and multiplies those, and cuts to bf16 where a GPU rounds to nearest; and 3.6's takes
    scalars in a way that NumPy 2.4 forbids."""
    tensor_methods, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot
    convert = interpreter._convert_float

    def rounded(x, from_type, to_type, rounding):
        if (from_type, to_type) != (tl.float32, tl.bfloat16):
            return convert(x, from_type, to_type, rounding)
        bits = x.astype(np.float32, copy=False).view(np.uint32)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(x), bits >> 16 | 0x40, nearest).astype(np.uint16)

    def with_index(tensor, scope):
        tensor_methods(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(x):
        if x.dtype != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def with_bf16(self, a, b, *more):
        return dot(self, widened(a), widened(b), *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", with_index)
        patch.setattr(interpreter, "_convert_float", rounded)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", with_bf16)
        yield


@pytest.fixture(params=["packed", "paged"])
def paged(request):
    return request.param == "paged"


def problem(case, paged):
    return (case.tensors().in_pages(), case.paged()) if paged else (case.tensors(), case.packed())


def assert_same_selection(tensors, plan, scale=None):
    blocks, scores = reference.select_blocks(tensors.index_q, tensors.index_k, plan, scale)
    assert triton_backend.refusal(tensors.index_q, tensors.index_k, plan) is None
    found, found_scores = triton_backend.select_blocks(tensors.index_q, tensors.index_k, plan, scale)
    assert found.dtype == torch.int32
    assert torch.equal(found, blocks)
    assert torch.equal(found_scores, scores)
    unscored, none = triton_backend.select_blocks(tensors.index_q, tensors.index_k, plan, scale, scores=False)
    assert none is None
    assert torch.equal(unscored, blocks)


def attend(module, t, blocks, plan, scale=0.3, *scales):
    if module is reference:
        return reference.attention(t.q, t.k, t.v, blocks, plan, scale, *scales)
    if blocks is None:
        return triton_backend.dense_attention(t.q, t.k, t.v, plan, scale, *scales)
    return triton_backend.sparse_attention(t.q, t.k, t.v, blocks, plan, scale, *scales)


def assert_close(tensors, blocks, plan, exact=None, scales=(None, None)):
    assert triton_backend.refusal(tensors.q, tensors.k, plan, tensors.v) is None
    out, lse = attend(triton_backend, tensors, blocks, plan, 0.3, *scales)
    wanted, wanted_lse = attend(reference, exact or tensors.double(), blocks, plan)
    assert out.dtype == tensors.q.dtype
    assert lse.dtype == torch.float32
    assert relative(out, wanted) <= TOLERANCE[out.dtype]
    assert relative(lse, wanted_lse) <= 1e-5


def selected(case):
    t = case.tensors()
    return reference.select_blocks(t.index_q, t.index_k, case.packed())[0]


# Selection -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_selection_equals_the_definition_bit_for_bit(case, paged):
    assert_same_selection(*problem(case, paged))


@pytest.mark.parametrize(("topk", "local", "init"), [(3, 1, 0), (4, 2, 1), (5, 1, 3)])
def test_ties_go_to_the_lower_block(topk, local, init):
    case = Case((5,), (64,), topk=topk, local=local, init=init)
    tensors = case.tensors()
    tensors.index_k.fill_(1.0)
    assert_same_selection(tensors, case.packed())


def test_the_two_zeros_and_negative_scores_rank_as_numbers_do():
    case = Case((1,), (48,), hi=1, hkv=1, di=1, topk=3)
    scores = torch.tensor([-2.0, -0.0, 0.0, -5.0, -1e-40, -7.0]).repeat_interleave(8)[:, None]
    tensors = replace(case.tensors(), index_q=torch.ones(1, 1, 1), index_k=scores)
    assert_same_selection(tensors, case.packed())
    assert triton_backend.select_blocks(tensors.index_q, scores, case.packed())[0].tolist() == [[[1, 2, 5]]]


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_half_precision_and_strided_index_keys(dtype, paged):
    tensors, plan = problem(CHUNK.but(dtype=dtype), paged)
    wide = torch.stack((tensors.index_k, tensors.index_k + 1), dim=-2)
    assert_same_selection(replace(tensors, index_k=wide[..., 0, :]), plan)


@pytest.mark.parametrize("scale", ["none", "number", "each page"])
def test_fp8_index_keys(scale):
    tensors, plan = problem(CHUNK.but(dtype=BF16), True)
    pages = tensors.index_k.to(torch.float8_e4m3fn)
    scale = {"none": None, "number": 0.5, "each page": 2.0 ** (torch.arange(len(pages)) % 4)}[scale]
    assert_same_selection(replace(tensors, index_k=pages), plan, scale)


@pytest.mark.parametrize("block", [8, 160])
def test_blocks_wider_and_rows_longer_than_a_step(block, monkeypatch):
    """A block of several steps; rows of several chunks; several programs a row."""
    monkeypatch.setattr(triton_backend, "ROWS", (16, 16))
    monkeypatch.setattr(triton_backend, "ROW_CHUNK", 16)
    monkeypatch.setattr(triton_backend, "_multiprocessors", lambda device: 99)
    n = 37 * block
    assert_same_selection(
        *problem(Case((2,), (n - 2,), hi=1, hkv=1, integers=True, block=block, topk=5, local=2, init=1), False)
    )


def test_strips_under_a_small_workspace_change_nothing(monkeypatch, paged):
    case = CHUNK
    tensors, plan = problem(case, paged)
    object.__setattr__(plan, "workspace_bytes", 4 * 20)
    strips = triton_tiles.strips_of(plan, case.hi, 64, True)
    assert len(strips.cuts) > 3
    assert strips.size <= 20
    assert_same_selection(tensors, plan)


# Attention -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CHUNK, WHOLE, ODD, FINE, TREE, CHUNK.but(hi=1, hkv=4), EDGES.but(topk=20)])
def test_attention_is_the_references(case, paged, monkeypatch):
    monkeypatch.setattr(triton_backend, "ROWS", (16, 16))  # several tiles a sequence
    case = case.but(integers=False)
    tensors, plan = problem(case, paged)
    for blocks in (selected(case), None):
        assert_close(tensors, blocks, plan)


@pytest.mark.parametrize("case", [CHUNK, FINE])
def test_any_blocks_do_and_rows_without_a_visible_key_give_zeros(case, paged):
    tensors, plan = problem(case.but(integers=False), paged)
    blocks = random_blocks(case, plan, 3)
    blocks[:, 0] = -1
    out, lse = attend(triton_backend, tensors, blocks, plan)
    assert not out[0].any()
    assert bool((lse[0] == -torch.inf).all())
    assert_close(tensors, blocks, plan)
    assert_close(tensors, blocks.flip(-1), plan)  # an order nobody promised


@pytest.mark.parametrize("case", [CHUNK.but(lens_q=(2, 3, 1)), DECODE, ODD.but(lens_q=(1, 1)), TREE])
def test_few_queries_are_split_over_their_keys(case, paged, monkeypatch):
    monkeypatch.setattr(triton_backend, "_multiprocessors", lambda device: 99)
    monkeypatch.setattr(triton_backend, "LEAST_SPAN", 8)
    monkeypatch.setattr(triton_backend, "STEPS", (16, 16))
    case = case.but(integers=False)
    tensors, plan = problem(case, paged)
    for blocks in (selected(case), None):
        assert_close(tensors, blocks, plan)


def test_unions_under_a_small_workspace_change_nothing():
    case = Case((13, 2), (20, 9), hkv=1, hi=1, block=4)
    tensors, plan = problem(case, False)
    blocks = selected(case)
    out, lse = attend(triton_backend, tensors, blocks, plan)
    object.__setattr__(plan, "workspace_bytes", 4 * 40)  # one tile of eight queries at a time
    again, again_lse = attend(triton_backend, tensors, blocks, plan)
    assert torch.equal(again, out)
    assert torch.equal(again_lse, lse)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("case", [CHUNK.but(d=80, block=16), WHOLE.but(d=64, group=4)])
def test_half_precision_is_within_its_rounding(case, dtype, paged):
    case = case.but(dtype=dtype, integers=False)
    tensors, plan = problem(case, paged)
    for blocks in (selected(case), None):
        assert_close(tensors, blocks, plan)


@pytest.mark.parametrize("scale", ["none", "number", "scalar", "each page"])
@pytest.mark.parametrize("case", [CHUNK.but(block=64, lens_k=(90, 40, 64)), DECODE])
def test_fp8_caches_are_dequantized_as_the_definition_says(case, scale):
    case = case.but(integers=False)
    tensors, plan = problem(case, True)
    quantized = replace(tensors, k=tensors.k.to(torch.float8_e4m3fn), v=tensors.v.to(torch.float8_e4m3fn))
    each = torch.rand(2, len(tensors.k), case.hkv, generator=torch.Generator().manual_seed(1)) + 0.5
    scales = {"none": (None, None), "number": (0.5, 2.0), "scalar": (torch.tensor(0.5), torch.tensor(2.0)),
              "each page": (each[0], each[1])}[scale]  # fmt: skip
    wide = [
        x.double() * (1.0 if s is None else s if not isinstance(s, torch.Tensor) or not s.dim() else s[..., None, None])
        for x, s in zip((quantized.k.float(), quantized.v.float()), scales)
    ]
    exact = replace(tensors.double(), k=wide[0], v=wide[1])
    for blocks in (selected(case), None):
        assert_close(quantized, blocks, plan, exact, scales)


def test_strided_queries_and_keys_are_read_in_place():
    case = Case((7, 4), (7, 4), block=4)
    tensors, plan = problem(case, False)
    q, k, v = torch.cat((tensors.q, tensors.k, tensors.v), dim=1).split((4, 2, 2), dim=1)
    for blocks in (selected(case), None):
        assert_close(replace(tensors, q=q, k=k, v=v), blocks, plan)


def test_the_same_input_gives_the_same_bits(paged):
    case = CHUNK.but(integers=False)
    tensors, plan = problem(case, paged)
    for blocks in (selected(case), None):
        once, twice = (attend(triton_backend, tensors, blocks, plan) for _ in range(2))
        assert torch.equal(once[0], twice[0])
        assert torch.equal(once[1], twice[1])


def test_no_queries_give_nothing():
    tensors, plan = problem(CHUNK.but(lens_q=(0, 0, 0)), False)
    blocks, scores = triton_backend.select_blocks(tensors.index_q, tensors.index_k, plan)
    assert blocks.shape == scores.shape == (2, 0, 3)
    for chosen in (blocks, None):
        out, lse = attend(triton_backend, tensors, chosen, plan)
        assert out.shape == (0, 4, 16)
        assert lse.shape == (0, 4)


def test_lengths_updated_in_place_are_followed():
    """A CUDA graph replays with new positions and pages; lengths on the host stay the largest."""
    case = DECODE.but(lens_k=(64, 40, 50))
    tensors, plan = problem(case, True)
    triton_backend.select_blocks(tensors.index_q, tensors.index_k, plan)
    plan.positions.copy_(torch.tensor([30, 7, 0]))
    assert_same_selection(tensors, plan)
    blocks = reference.select_blocks(tensors.index_q, tensors.index_k, plan)[0]
    for chosen in (blocks, None):
        assert_close(replace(tensors, q=tensors.q / 3), chosen, plan)


# Gradients -----------------------------------------------------------------------------------------------------------


def gradients(module, t, blocks, plan):
    inputs = [x.detach().requires_grad_() for x in (t.q, t.k, t.v)]
    out, lse = attend(module, replace(t, q=inputs[0], k=inputs[1], v=inputs[2]), blocks, plan)
    assert not (module is triton_backend and lse.requires_grad)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return torch.autograd.grad((out * direction).sum(), inputs)


@pytest.mark.parametrize(
    "case",
    [
        Case((3, 0, 1), (17, 3, 9), hkv=1, hi=1, group=3, d=20),
        Case((9, 1), (9, 1), block=4, hkv=2, hi=1, group=1, topk=2),
        Case((2,), (70,), hkv=1, hi=1, topk=2, block=40),  # a block of several tiles
        Case((5,), (20,), hkv=1, hi=1, positions=(16, 17, 17, -1, 3)),
    ],
)
def test_gradients_are_those_of_the_reference(case, monkeypatch):
    monkeypatch.setattr(triton_backend, "ROWS", (32, 32))
    case = case.but(integers=False)
    tensors, plan = problem(case, False)
    for blocks in (selected(case), random_blocks(case, plan, 3), None):
        found = gradients(triton_backend, tensors, blocks, plan)
        wanted = gradients(reference, tensors.double(), blocks, plan)
        scale = max(float(x.abs().max()) for x in wanted)  # one measure: dq vanishes where a row has one key
        for x, y in zip(found, wanted):
            assert float((x - y).abs().max()) <= 2e-5 * scale
        assert all(torch.equal(x, y) for x, y in zip(found, gradients(triton_backend, tensors, blocks, plan)))


def test_bf16_gradients_are_within_their_rounding():
    case = Case((4,), (23,), hkv=1, hi=1, dtype=BF16, d=32)
    tensors, plan = problem(case, False)
    for blocks in (selected(case), None):
        found = gradients(triton_backend, tensors, blocks, plan)
        for x, y in zip(found, gradients(reference, tensors.double(), blocks, plan)):
            assert x.dtype == BF16
            assert relative(x, y) <= 2e-2


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q": torch.zeros(22, 4, 16, dtype=torch.float64)}, "float64"),
        ({"k": torch.zeros(141, 2, 16, dtype=torch.int8)}, "int8"),
        ({"v": torch.zeros(141, 2, 16, dtype=torch.float64)}, "float64"),
        ({"q": torch.zeros(22, 4, 512)}, "head dim 512"),
        ({"q": torch.zeros(22, 130, 16)}, "65 query heads"),
        ({"k": torch.zeros(141, 16, 2).transpose(1, 2)}, "last axis"),
    ],
)
def test_what_it_cannot_serve_it_names(change, reason):
    tensors = CHUNK.tensors()
    plan = CHUNK.packed()
    inputs = {"q": tensors.q, "k": tensors.k, "plan": plan, "v": tensors.v}
    assert triton_backend.refusal(**inputs) is None
    assert reason in triton_backend.refusal(**(inputs | change))
    pages = CHUNK.tensors().in_pages()
    assert "gradients" in triton_backend.refusal(pages.q.requires_grad_(), pages.k, CHUNK.paged(), pages.v)
    assert "topk = 200" in triton_backend.refusal(**(inputs | {"plan": CHUNK.but(topk=200).packed()}))
