"""The Hopper backend's plain Triton kernels on the CPU, in Triton's interpreter, against the reference.
`test_msa_hopper.py` runs this file in a process of its own, with TRITON_INTERPRET=1."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from msa_cases import Case, random_blocks, relative

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("for the interpreter", allow_module_level=True)

from triton_interpreted import an_interpreter_that_multiplies_bf16  # noqa: E402, F401

from openm3.msa import hopper_backend, hopper_decode, hopper_exact, reference, triton_attend, triton_backend  # noqa: E402
from openm3.msa.exact import index_error  # noqa: E402

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
STEP = Case(
    (1, 1, 1), (1500, 129, 1), hkv=2, group=8, hi=2, d=128, di=128, block=128, topk=8, integers=True, dtype=BF16
)
RAGGED = STEP.but(lens_q=(2, 0, 1), lens_k=(1300, 4, 128), hi=4, hkv=4, group=16)
TREE = STEP.but(lens_q=(4, 2), lens_k=(1200, 17), positions=(1100, 1101, 1101, 300, 16, -1))
FORCED = STEP.but(lens_k=(2500, 1400, 1281), local=3, init=4)
CASES = [STEP, RAGGED, TREE, FORCED, STEP.but(topk=16, lens_k=(2200, 2049, 2048), hi=1)]


@pytest.fixture(autouse=True)
def _no_portable_kernel_instead(monkeypatch):
    """Few multiprocessors, so that shares hold several blocks; and nothing is handed on."""
    monkeypatch.setattr(triton_backend, "_multiprocessors", lambda device: 4)

    def never(*args):
        raise AssertionError("handed on to the portable backend")

    for name in ("select_blocks", "sparse_attention", "dense_attention"):
        monkeypatch.setattr(triton_backend, name, never)


def assert_same_selection(t, plan, scale=None):
    assert hopper_backend.refusal(t.index_q, t.index_k, plan) is None
    wanted, scores = reference.select_blocks(t.index_q, t.index_k, plan, scale)
    found, values = hopper_backend.select_blocks(t.index_q, t.index_k, plan, scale)
    assert torch.equal(found, wanted)
    assert torch.equal(values, scores)
    assert torch.equal(hopper_backend.select_blocks(t.index_q, t.index_k, plan, scale, scores=False)[0], wanted)


def attend(module, t, blocks, plan, *scales):
    if module is reference:
        return reference.attention(t.q, t.k, t.v, blocks, plan, 0.05, *scales)
    if blocks is None:
        return module.dense_attention(t.q, t.k, t.v, plan, 0.05, *scales)
    return module.sparse_attention(t.q, t.k, t.v, blocks, plan, 0.05, *scales)


def assert_close(t, blocks, plan, exact=None, scales=(None, None)):
    assert hopper_backend.refusal(t.q, t.k, plan, t.v) is None
    out, lse = attend(hopper_backend, t, blocks, plan, *scales)
    wanted, wanted_lse = attend(reference, exact or t.double(), blocks, plan)
    assert out.dtype == t.q.dtype
    assert relative(out, wanted) <= 5e-3
    assert relative(lse, wanted_lse) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_selection_equals_the_definition_bit_for_bit(case):
    assert_same_selection(case.tensors().in_pages(), case.paged())


@pytest.mark.parametrize(("local", "init"), [(1, 0), (2, 1), (8, 0), (1, 7)])
@pytest.mark.parametrize("value", [1.0, 0.0])
def test_ties_go_to_the_lower_block(local, init, value):
    case = STEP.but(lens_q=(2,), lens_k=(1700,), local=local, init=init)
    t = case.tensors().in_pages()
    assert_same_selection(replace(t, index_k=torch.full_like(t.index_k, value)), case.paged())


@pytest.mark.parametrize("scale", [None, 0.5, "each page"])
def test_fp8_index_keys(scale):
    t, plan = RAGGED.tensors().in_pages(), RAGGED.paged()
    pages = t.index_k.to(FP8)
    scale = 2.0 ** (torch.arange(len(pages)) % 4) if scale == "each page" else scale
    assert_same_selection(replace(t, index_k=pages), plan, scale)


@pytest.fixture
def rescored(monkeypatch):
    """Short contexts too are scanned in fp8 first. How many blocks of each row were then scored exactly, by launch."""
    monkeypatch.setattr(hopper_backend, "TUNING", replace(hopper_backend.TUNING, scan_blocks=0))
    kernel, lengths = hopper_exact.rescore_step, []

    class Watched:
        def __getitem__(self, grid):
            def launch(*args, **options):
                lengths.append(args[3][:, : grid[1]])
                kernel[grid](*args, **options)

            return launch

    monkeypatch.setattr(hopper_exact, "rescore_step", Watched())
    return lengths


def quantized(index_k):
    """fp8 pages with the largest value each can have at 448, and the scales."""
    scale = index_k.float().abs().amax((1, 2)) / 448
    return (index_k / scale.clamp_min(1e-30)[:, None, None]).to(FP8), scale


def assert_exact(t, plan, keys, scale):
    """The selection from fp8 keys is that of the exact keys, scores and all."""
    error = index_error(t.index_k, keys, scale)
    wanted, scores = hopper_backend.select_blocks(t.index_q, t.index_k, plan)
    found, values = hopper_backend.select_exactly(t.index_q, keys, plan, scale, True, t.index_k, error)
    assert torch.equal(found, wanted)
    assert torch.equal(values, scores)
    return found


@pytest.mark.parametrize("case", [RAGGED, TREE, FORCED.but(lens_k=(1500, 129, 1281))])
def test_exact_selection_from_fp8_keys_is_the_exact_keys_selection(case, rescored):
    t, plan = case.but(integers=False).tensors().in_pages(), case.paged()
    keys, scale = quantized(t.index_k)
    found = assert_exact(t, plan, keys, scale)
    assert len(rescored) == 1
    error = index_error(t.index_k, keys, scale)
    unscored, _ = hopper_backend.select_exactly(t.index_q, keys, plan, scale, False, t.index_k, error)
    assert torch.equal(unscored, found)


def test_a_long_context_has_few_blocks_scored_again_and_an_approximate_selection_is_another(rescored):
    case = STEP.but(integers=False, lens_q=(1,), lens_k=(128 * 110,), hi=1, seed=1)
    t, plan = case.tensors().in_pages(), case.paged()
    keys, scale = quantized(t.index_k)
    wanted = assert_exact(t, plan, keys, scale)
    assert not torch.equal(hopper_backend.select_blocks(t.index_q, keys, plan, scale)[0], wanted)
    assert 8 <= int(rescored[0]) <= 55


ONE = STEP.but(integers=False, lens_q=(1,), lens_k=(2500,), hi=1)


def adversarial(kind, t):
    """Index keys, their fp8 copy and its scale."""
    keys, towards = t.index_k.float(), t.index_q[0, 0].float().sign()
    step = torch.arange(keys[..., 0].numel()).view(keys.shape[:2])
    if kind == "all equal":
        keys = torch.full_like(keys, 1.03)
    elif kind == "one huge key":
        keys[7, 5] = 3e4
    elif kind == "beyond the limits":
        return keys * 600, 1.0
    elif kind == "subnormal":
        return keys * 2.0**-9, 1.0
    elif kind == "vanishing":
        return keys * 2.0**-16, 1.0
    elif kind == "no scale":
        return keys, torch.zeros(len(keys))
    elif kind == "errors that all point one way":  # midway between two fp8 numbers, rounded up or down by the key
        keys = towards * (16.0 + 2 * (step * 7 % 4) + 1)[..., None]
    elif kind == "errors that change the order":
        keys = towards * torch.tensor([15.5, 15.625, 16.875, 17.0, 17.125])[step * 3 % 5][..., None]
        keys[..., ::3] *= 0.5 + (step % 11)[..., None] / 64
    elif kind == "clustered":
        keys = keys[:1, :1] + keys * 0.01
    return keys, None


@pytest.mark.parametrize(
    "kind",
    ["all equal", "one huge key", "beyond the limits", "subnormal", "vanishing", "no scale", "clustered",
     "errors that all point one way", "errors that change the order"],
)  # fmt: skip
def test_no_key_misleads_the_exact_selection(kind, rescored):
    t, plan = ONE.tensors().in_pages(), ONE.paged()
    exact, scale = adversarial(kind, t)
    t = replace(t, index_k=exact.to(BF16))
    if scale is None:
        keys, scale = quantized(t.index_k)
    else:
        keys = t.index_k.float().clamp(-448, 448).to(FP8)
    assert_exact(t, plan, keys, scale)
    if kind in ("all equal", "no scale"):
        assert int(rescored[0]) == 20  # the worst case: any block may be the best


def test_a_row_longer_than_a_piece_is_listed_piece_by_piece(rescored, monkeypatch):
    t, plan = ONE.tensors().in_pages(), ONE.paged()
    assert_exact(t, plan, *quantized(t.index_k))
    monkeypatch.setattr(hopper_backend, "LIST_PIECE", 8)
    assert_exact(t, plan, *quantized(t.index_k))
    assert 8 <= int(rescored[0]) < int(rescored[1]) <= 20  # the fewer groups, the lower the bar


@pytest.mark.parametrize("error", [torch.inf, torch.nan])
def test_an_error_without_bound_lists_its_page(error, rescored):
    t, plan = ONE.tensors().in_pages(), ONE.paged()
    keys, scale = quantized(t.index_k)
    errors = index_error(t.index_k, keys, scale)
    errors[plan.page_table[0, ::2].long()] = error
    found, _ = hopper_backend.select_exactly(t.index_q, keys, plan, scale, True, t.index_k, errors)
    assert torch.equal(found, hopper_backend.select_blocks(t.index_q, t.index_k, plan)[0])
    assert int(rescored[0]) >= 10


@pytest.mark.parametrize(("case", "keys"), [(STEP, 64), (RAGGED, 64), (TREE, 64), (RAGGED, 128)])
def test_attention_is_the_references(case, keys, monkeypatch):
    monkeypatch.setattr(hopper_backend, "TUNING", replace(hopper_backend.TUNING, attend_keys=keys))
    case = case.but(integers=False)
    t, plan = case.tensors().in_pages(), case.paged()
    assert_close(t, random_blocks(case, plan, 1), plan)
    assert_close(t, None, plan)


@pytest.mark.parametrize("cards", [1, 132])
def test_a_split_of_any_size_gives_the_same(cards, monkeypatch):
    monkeypatch.setattr(triton_backend, "_multiprocessors", lambda device: cards)
    case = RAGGED.but(hi=1, hkv=1, lens_q=(2, 1), lens_k=(900, 300))
    assert_same_selection(case.tensors().in_pages(), case.paged())
    t, plan = case.but(integers=False).tensors().in_pages(), case.paged()
    for blocks in (random_blocks(case, plan), None):
        assert_close(t, blocks, plan)


def assert_fp8_close(t, plan, scale, selections):
    fp8 = replace(t, k=t.k.to(FP8), v=t.v.to(FP8))
    each = torch.rand(2, *t.k.shape[:2], generator=torch.Generator().manual_seed(1)) + 0.5
    scales = {"none": (None, None), "number": (0.5, 2.0), "each page": (each[0], each[1])}[scale]
    wide = [
        x.double() * (1.0 if s is None else s if isinstance(s, float) else s[..., None, None])
        for x, s in zip((fp8.k.float(), fp8.v.float()), scales)
    ]
    for blocks in selections:
        assert_close(fp8, blocks, plan, replace(t.double(), k=wide[0], v=wide[1]), scales)


@pytest.mark.parametrize("scale", ["none", "number", "each page"])
def test_fp8_caches_are_dequantized_as_the_definition_says(scale):
    case = STEP.but(integers=False, lens_k=(700, 129, 40))
    t, plan = case.tensors().in_pages(), case.paged()
    assert_fp8_close(t, plan, scale, [random_blocks(case, plan), None])


def test_lengths_updated_in_place_are_followed():
    t, plan = STEP.tensors().in_pages(), STEP.paged()
    plan.positions.copy_(torch.tensor([1300, 7, 0]))
    assert_same_selection(t, plan)
    t = STEP.but(integers=False).tensors().in_pages()
    for blocks in (random_blocks(STEP, plan), None):
        assert_close(t, blocks, plan)


def test_keys_and_values_that_share_a_page_are_read_in_place():
    case = STEP.but(integers=False, lens_k=(300, 129, 1))
    t, plan = case.tensors().in_pages(), case.paged()
    k, v = torch.cat((t.k, t.v), dim=-1).split(128, dim=-1)
    assert_close(replace(t, k=k, v=v), None, plan)


def test_many_parts_are_combined_piece_by_piece():
    generator = torch.Generator().manual_seed(0)
    part, part_lse = torch.randn(40, 3, 128, generator=generator), torch.randn(40, 3, generator=generator)
    part_lse[5:, 1] = -torch.inf
    part_lse[:, 2] = -torch.inf
    out, lse = torch.empty(3, 128), torch.empty(3)
    hopper_decode.combine_step[(3,)](part, part_lse, out, lse, 3, 40, PARTS_PAD=64, PIECE=32, D=128, PDL=False)
    weights = torch.exp(part_lse.double()[:, :2])
    wanted = (part.double()[:, :2] * weights[..., None]).sum(0) / weights.sum(0)[:, None]
    assert relative(out[:2], wanted) <= 1e-6
    assert not out[2].any()
    assert relative(lse, part_lse.double().logsumexp(0)) <= 1e-6


# Prompts -------------------------------------------------------------------------------------------------------------

PROMPT = STEP.but(lens_q=(11, 2, 1), lens_k=(1200, 130, 1), hkv=2, hi=1, integers=False)


@pytest.fixture
def prompts(monkeypatch):
    """11 queries are no decode step; what the interpreter does not run is done by the portable kernel."""
    monkeypatch.setattr(hopper_backend, "MOST_QUERIES", 10)
    monkeypatch.setattr(hopper_backend, "_attend_step", None)
    monkeypatch.setattr(hopper_backend, "_attend_tiles", united_by_the_portable_kernel)


def united_by_the_portable_kernel(q, k, v, plan, scale, tiles, a, n, lists, lengths, out, lse):
    """Stands for the kernel in Gluon, which the interpreter does not run."""
    (tokens, hq, _), hkv = q.shape, k.shape[1]
    call = triton_backend.Call(q, k, v, plan, scale, None, None)
    triton_attend.attend_selected[(n, hkv, 1)](
        q, k, v, lists, lengths, out, lse, *call.scales, tiles.seq, tiles.first, tiles.count, plan.positions,
        plan.cu_seqlens_k, *call.strides, tokens, hq, *call.factors, a, GROUP=hq // hkv, SHARE=hkv // lists.shape[1],
        D=128, D_PAD=128, BLOCK=128, TOPK=plan.topk, TOPK_PAD=plan.topk, QUERIES=8, BM=8 * hq // hkv, BN=128,
        **call.switches,
    )  # fmt: skip


def agreeing(case, plan):
    """Random blocks, but the first eight queries of a sequence take the same ones."""
    blocks = random_blocks(case, plan, 5)
    for start, n in zip(plan.starts_q(), plan.lens_q):
        blocks[:, start : start + min(n, 8)] = blocks[:, start : start + 1]
    return blocks


@pytest.mark.parametrize("union", [0, 1.125, 8])
def test_each_tile_goes_its_own_way_to_the_same_result(union, prompts, monkeypatch):
    tuning = replace(hopper_backend.TUNING, union=union, gather_chunk=8)
    monkeypatch.setattr(hopper_backend, "TUNING", tuning)
    t, plan = PROMPT.tensors().in_pages(), PROMPT.paged()
    blocks = agreeing(PROMPT, plan)
    blocks[:, 8:11] = -1  # a tile without any
    assert_close(t, blocks, plan)


@pytest.mark.parametrize("scale", ["number", "each page"])
def test_a_prompt_over_fp8_pages(scale, prompts):
    t, plan = PROMPT.tensors().in_pages(), PROMPT.paged()
    assert_fp8_close(t, plan, scale, [agreeing(PROMPT, plan)])


def test_a_prompt_in_pieces_under_a_small_workspace(prompts):
    t, plan = PROMPT.tensors().in_pages(), PROMPT.paged()
    blocks = agreeing(PROMPT, plan).flip(-1)  # an order nobody promised
    whole = attend(hopper_backend, t, blocks, plan)
    plan = PROMPT.paged()
    object.__setattr__(plan, "workspace_bytes", 1 << 18)
    assert len(hopper_backend._pieces(plan, 8)[1]) == 4
    cut = attend(hopper_backend, t, blocks, plan)
    assert torch.equal(whole[0], cut[0])
    assert torch.equal(whole[1], cut[1])


def test_a_page_that_two_sequences_share_is_read_for_both(prompts, monkeypatch):
    monkeypatch.setattr(hopper_backend, "TUNING", replace(hopper_backend.TUNING, union=0))
    t, plan = PROMPT.tensors().in_pages(), PROMPT.paged()
    plan.page_table[1, 0] = plan.page_table[0, 0]
    assert_close(t, random_blocks(PROMPT, plan, 1), plan)
