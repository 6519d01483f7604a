"""Attention: the torch backend against the reference in float64, forward and backward, on every way a plan can take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, example, given, settings
from msa_cases import Case, cases, random_blocks, relative

from openm3 import msa
from openm3.msa import decode, flex, reference, tiles

RUN = settings(deadline=None, max_examples=40)
FLOAT32, BFLOAT16 = 1e-5, 5e-3  # relative to the largest output: msa.md's exactness rule
CHUNK = Case((5, 16, 1), (37, 40, 64))
WHOLE = Case((40, 9, 70), (40, 9, 70))
LONG = Case((130,), (300,), topk=4, d=8)


def attend(t, blocks, plan, backend, **more):
    """Sparse for given blocks, dense for None; always with the lse."""
    if blocks is None:
        return msa.dense_attention(t.q, t.k, t.v, plan, return_lse=True, backend=backend, **more)
    return msa.sparse_attention(t.q, t.k, t.v, blocks, plan, return_lse=True, backend=backend, **more)


def selected(case, plan):
    return msa.select_blocks(case.tensors().index_q, case.tensors().index_k, case.packed(), backend="reference")


def assert_close(case, tensors, blocks, plan, exact=None, **more):
    out, lse = attend(tensors, blocks, plan, "torch", **more)
    wanted, wanted_lse = attend(exact or tensors.double(), blocks, plan, "reference", **more)
    assert out.dtype == tensors.q.dtype
    assert lse.dtype == torch.float32
    assert relative(out, wanted) <= (BFLOAT16 if case.dtype == torch.bfloat16 else FLOAT32)
    # Absolute: an lse near 0 comes of larger scores. PyTorch's fused kernel takes bf16 exponentials from a polynomial.
    assert torch.allclose(lse, wanted_lse, rtol=FLOAT32, atol=2e-4 if case.dtype == torch.bfloat16 else 1e-5)


# Forward -------------------------------------------------------------------------------------------------------------


@RUN
@given(cases())
@example(CHUNK)
@example(WHOLE)
@example(LONG)
@example(CHUNK.but(lens_q=(1, 1, 1)))
@example(WHOLE.but(topk=20))
@example(WHOLE.but(hi=1, hkv=3, group=3))
def test_packed_attention_is_the_references(case):
    plan, tensors = case.packed(), case.tensors()
    assert_close(case, tensors, selected(case, plan), plan)
    assert_close(case, tensors, None, plan)


@RUN
@given(cases())
@example(CHUNK)
@example(CHUNK.but(shuffled=False))
@example(CHUNK.but(lens_q=(1, 1, 1)))
@example(CHUNK.but(lens_q=(1, 1, 1), lens_k=(4097, 9, 4099)))  # too long to be gathered in decode
@example(CHUNK.but(lens_q=(20,), lens_k=(400,), topk=50))  # a chunk that sees all of its context
def test_attention_over_pages_is_the_references(case):
    plan = case.paged()
    for by_head in (True, False):
        tensors = case.tensors().in_pages(by_head)
        assert_close(case, tensors, selected(case, plan), plan)
        assert_close(case, tensors, None, plan)


@RUN
@given(cases())
def test_any_blocks_do_and_rows_without_a_visible_key_give_zeros(case):
    assume(sum(case.lens_q) > 0)
    plan, tensors = case.packed(), case.tensors()
    blocks = random_blocks(case, plan, case.seed)
    blocks[:, 0] = -1
    out, lse = attend(tensors, blocks, plan, "torch")
    assert not out[0].any()
    assert bool((lse[0] == -torch.inf).all())
    assert_close(case, tensors, blocks, plan)
    assert_close(case, tensors.in_pages(), blocks, case.paged())


def test_positions_before_the_first_key_give_zeros():
    case = Case((3,), (30,), positions=(-1, 29, 4))
    tensors, plan = case.tensors(), case.packed()
    for blocks in (None, selected(case, plan)):
        out, lse = attend(tensors, blocks, plan, "torch")
        assert not out[0].any()
        assert bool((lse[0] == -torch.inf).all())
        assert_close(case, tensors, blocks, plan)


@pytest.mark.parametrize("case", [CHUNK, WHOLE, LONG, CHUNK.but(lens_q=(1, 1, 1)), WHOLE.but(topk=20)])
@pytest.mark.parametrize("paged", [False, True])
def test_bf16_is_within_its_rounding(case, paged):
    case = case.but(dtype=torch.bfloat16, d=32)
    tensors = case.tensors().in_pages() if paged else case.tensors()
    plan = case.paged() if paged else case.packed()
    assert_close(case, tensors, selected(case, plan), plan)
    assert_close(case, tensors, None, plan)


@pytest.mark.parametrize("case", [CHUNK, CHUNK.but(lens_q=(1, 1, 1)), WHOLE, WHOLE.but(topk=20, shuffled=False)])
@pytest.mark.parametrize("scale", ["none", "number", "scalar", "each page"])
def test_fp8_caches_are_dequantized_as_the_definition_says(case, scale):
    tensors, plan = case.tensors().in_pages(), case.paged()
    pages = len(tensors.k)
    k, v = tensors.k.to(torch.float8_e4m3fn), tensors.v.to(torch.float8_e4m3fn)
    generator = torch.Generator().manual_seed(1)
    per_page = torch.rand(2, pages, case.hkv, generator=generator) + 0.5
    k_scale, v_scale = {
        "none": (None, None), "number": (0.5, 2.0), "scalar": (torch.tensor(0.5), torch.tensor(2.0)),
        "each page": (per_page[0], per_page[1]),
    }[scale]  # fmt: skip
    quantized = replace(tensors, k=k, v=v)
    exact = replace(tensors.double(), k=_dequantized(k, k_scale), v=_dequantized(v, v_scale))
    for blocks in (selected(case, plan), None):
        wanted = attend(exact, blocks, plan, "reference")
        for backend in ("reference", "torch"):
            found = attend(quantized, blocks, plan, backend, k_scale=k_scale, v_scale=v_scale)
            assert found[0].dtype == torch.float32
            assert relative(found[0], wanted[0]) <= FLOAT32
            assert relative(found[1], wanted[1]) <= FLOAT32


def _dequantized(pages, scale):
    wide = pages.float().double()
    if scale is None or not isinstance(scale, torch.Tensor) or not scale.dim():
        return wide * (1.0 if scale is None else float(scale))
    return wide * scale.double()[..., None, None]


def test_the_softmax_scale_given_is_the_one_used():
    tensors, plan = WHOLE.tensors(), WHOLE.packed()
    for blocks in (selected(WHOLE, plan), None):
        assert_close(WHOLE, tensors, blocks, plan, softmax_scale=0.7)
        plain = attend(tensors, blocks, plan, "torch")[0]
        assert relative(attend(tensors, blocks, plan, "torch", softmax_scale=0.7)[0], plain) > 0.01


def test_strided_queries_and_keys_are_read_in_place():
    tensors, plan = WHOLE.tensors(), WHOLE.packed()
    fused = torch.cat((tensors.q, tensors.k, tensors.v), dim=1)
    q, k, v = fused.split((4, 2, 2), dim=1)
    strided = replace(tensors, q=q, k=k, v=v)
    for blocks in (selected(WHOLE, plan), None):
        assert torch.equal(attend(strided, blocks, plan, "torch")[0], attend(tensors, blocks, plan, "torch")[0])


# Backward ------------------------------------------------------------------------------------------------------------


def gradients(t, blocks, plan, backend):
    inputs = [x.detach().requires_grad_() for x in (t.q, t.k, t.v)]
    leaf = replace(t, q=inputs[0], k=inputs[1], v=inputs[2])
    out = attend(leaf, blocks, plan, backend)[0]
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return torch.autograd.grad((out * direction).sum(), inputs)


@RUN
@given(cases())
@example(CHUNK)
@example(WHOLE)
@example(LONG)
@example(WHOLE.but(topk=20))
@example(WHOLE.but(hi=1, hkv=3, group=3))
def test_gradients_are_those_of_the_reference(case):
    assume(sum(case.lens_q) > 0)
    plan, tensors = case.packed(), case.tensors()
    for blocks in (selected(case, plan), random_blocks(case, plan, case.seed), None):
        found = gradients(tensors, blocks, plan, "torch")
        wanted = gradients(tensors.double(), blocks, plan, "reference")
        scale = max(float(x.abs().max()) for x in wanted)  # one measure: dq vanishes where a row has one key
        for x, y in zip(found, wanted):
            assert float((x - y).abs().max()) <= 2e-5 * scale


def test_bf16_gradients_are_within_their_rounding():
    case = WHOLE.but(dtype=torch.bfloat16, d=32)
    plan, tensors = case.packed(), case.tensors()
    for blocks in (selected(case, plan), None):
        found = gradients(tensors, blocks, plan, "torch")
        for x, y in zip(found, gradients(tensors.double(), blocks, plan, "reference")):
            assert x.dtype == torch.bfloat16
            assert relative(x, y) <= 1e-2


# Pieces, paths, repetition -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paged", [False, True])
def test_a_small_workspace_gives_the_same_result(monkeypatch, paged):
    case = LONG.but(lens_q=(300, 40), lens_k=(300, 90), group=4, d=16)
    tensors = case.tensors().in_pages() if paged else case.tensors()
    plans = [c.paged() if paged else c.packed() for c in (case, case.but(workspace=1 << 20))]
    blocks = selected(case, plans[0])
    whole = [attend(tensors, b, plans[0], "torch") for b in (blocks, None)]
    strips = list(tiles._strips(tensors.q, blocks, plans[1].positions, _keys(tensors, case), plans[1], 1.0))
    assert len(strips) > 1
    monkeypatch.setattr(tiles, "PIECE_BYTES", 20_000)
    for b, (out, lse) in zip((blocks, None), whole):
        again, again_lse = attend(tensors, b, plans[1], "torch")
        assert relative(again, out) <= 1e-6
        assert relative(again_lse, lse) <= 1e-6


def _keys(tensors, case):
    return tiles.Keys(tensors.k[:, :, None], tensors.v, None, -(-max(case.lens_k) // case.block))


def test_a_small_workspace_gives_the_same_gradients(monkeypatch):
    case = LONG.but(lens_q=(300, 40), lens_k=(300, 90), group=4, d=16)
    tensors, plan = case.tensors(), case.packed()
    blocks = selected(case, plan)
    whole = [gradients(tensors, b, plan, "torch") for b in (blocks, None)]
    monkeypatch.setattr(tiles, "PIECE_BYTES", 20_000)
    for b, wanted in zip((blocks, None), whole):
        for x, y in zip(gradients(tensors, b, case.but(workspace=1 << 20).packed(), "torch"), wanted):
            assert relative(x, y) <= 3e-6


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@settings(RUN, max_examples=12)
@given(cases(explicit=False))
@example(Case((130, 9), (300, 140), topk=4))  # more than one tile of queries and of keys
@example(Case((40, 200), (40, 200), hi=1, hkv=2, group=2))
@example(CHUNK.but(lens_q=(1, 1, 1)))
def test_the_flex_path_is_the_references(case):
    tensors, plan = case.tensors(), case.packed()
    scale = case.d**-0.5
    with torch.no_grad():
        for blocks in (selected(case, plan), None):
            for t, p in ((tensors, plan), (case.tensors().in_pages(), case.paged())):
                out, lse = flex.attention(t.q, t.k, t.v, blocks, p, scale, compiled=False)
                wide = t.double()
                wanted, wanted_lse = reference.attention(wide.q, wide.k, wide.v, blocks, p, scale)
                assert relative(out, wanted) <= FLOAT32
                assert bool(torch.allclose(lse, wanted_lse, rtol=1e-5, atol=1e-5))


@RUN
@given(cases(decode=True))
@example(Case((1,) * 5, (30, 31, 32, 33, 1), workspace=1 << 20))
def test_the_decode_path_is_the_references(case):
    tensors, plan = case.tensors().in_pages(), case.paged()
    scale, wide = case.d**-0.5, tensors.double()
    for blocks in (selected(case, plan), random_blocks(case, plan, case.seed), None):
        out, lse = decode.attention(tensors.q, tensors.k, tensors.v, blocks, plan, scale, None, None)
        wanted, wanted_lse = reference.attention(wide.q, wide.k, wide.v, blocks, plan, scale)
        assert relative(out, wanted) <= FLOAT32
        assert bool(torch.allclose(lse, wanted_lse, rtol=1e-5, atol=1e-5))


def test_decode_in_steps_under_the_workspace_is_the_same():
    case = Case((1,) * 40, (200,) * 40, topk=20, d=64, hi=2, hkv=2)
    tensors = case.tensors().in_pages()
    plan, small = case.paged(), case.but(workspace=1 << 20).paged()
    assert decode.fits(plan)
    for blocks in (selected(case, plan), None):
        args = (tensors.q, tensors.k, tensors.v, blocks)
        out, lse = decode.attention(*args, plan, 0.125, None, None)
        again, again_lse = decode.attention(*args, small, 0.125, None, None)
        assert relative(again, out) <= 1e-6
        assert relative(again_lse, lse) <= 1e-6


@pytest.mark.parametrize("case", [WHOLE, CHUNK, LONG])
def test_the_same_input_gives_the_same_bits(case):
    tensors, plan = case.tensors(), case.packed()
    for blocks in (selected(case, plan), None):
        once, twice = (attend(tensors, blocks, plan, "torch") for _ in range(2))
        assert torch.equal(once[0], twice[0])
        assert torch.equal(once[1], twice[1])
        for x, y in zip(gradients(tensors, blocks, plan, "torch"), gradients(tensors, blocks, plan, "torch")):
            assert torch.equal(x, y)


def test_all_blocks_selected_is_dense_attention():
    case = WHOLE.but(topk=9)
    tensors, plan = case.tensors(), case.packed()
    sparse, dense = (attend(tensors, blocks, plan, "torch") for blocks in (selected(case, plan), None))
    assert relative(sparse[0], dense[0]) <= FLOAT32


def test_a_key_outside_the_selected_blocks_changes_nothing():
    case = Case((1,), (64,), hi=1, hkv=1, topk=2)
    tensors, plan = case.tensors(), case.packed()
    blocks = torch.tensor([[[2, 7]]], dtype=torch.int32)
    out = attend(tensors, blocks, plan, "torch")[0]
    for block in range(8):
        tensors.v[block * 8 : block * 8 + 8] += 100.0
        changed = not torch.equal(attend(tensors, blocks, plan, "torch")[0], out)
        assert changed == (block in (2, 7))
        tensors.v[block * 8 : block * 8 + 8] -= 100.0
        out = attend(tensors, blocks, plan, "torch")[0]
