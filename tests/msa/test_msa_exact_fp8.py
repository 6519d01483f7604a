"""Exact selection from fp8 index keys: what each backend promises, the error it is told, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msa_cases import Case, cases

from openm3 import msa
from openm3.msa import dispatch
from openm3.msa.exact import _errors

FP8 = torch.float8_e4m3fn
CHUNK = Case((5, 1, 1), (37, 40, 64))


def problem(case):
    """Pages, their plan, and what a caller keeps beside fp8 pages."""
    t, plan = case.tensors().in_pages(), case.paged()
    scale = t.index_k.float().abs().amax((1, 2)) / 448
    keys = (t.index_k / scale[:, None, None]).to(FP8)
    copies = dict(
        index_k_scale=scale, index_k_exact=t.index_k, index_k_error=msa.index_error(t.index_k, keys, scale)
    )  # fmt: skip
    return t, plan, keys, copies


@settings(deadline=None, max_examples=40)
@given(cases(), st.sampled_from(["torch", "reference", None]))
def test_the_selection_is_that_of_the_exact_keys(case, backend):
    t, plan, keys, copies = problem(case)
    wanted, scores = msa.select_blocks(t.index_q, t.index_k, plan, return_scores=True, backend=backend)
    found, values = msa.select_blocks(t.index_q, keys, plan, return_scores=True, backend=backend, **copies)
    assert torch.equal(found, wanted)
    assert torch.equal(values, scores)


def test_a_backend_that_scans_is_given_both_copies_and_one_that_cannot_read_fp8_the_exact_one(monkeypatch):
    t, plan, keys, copies = problem(CHUNK)
    seen = []

    def exactly(*args):
        seen.append(args)
        return msa.dispatch.BACKENDS["torch"].select_blocks(args[0], args[5], args[2], None, args[4])

    scanner = replace(dispatch.BACKENDS["torch"], select_exactly=exactly)
    monkeypatch.setitem(dispatch.BACKENDS, "scanner", scanner)
    wanted = msa.select_blocks(t.index_q, t.index_k, plan)
    assert torch.equal(msa.select_blocks(t.index_q, keys, plan, backend="scanner", **copies), wanted)
    assert seen[0][1] is keys
    assert seen[0][6] is copies["index_k_error"]
    picky = replace(scanner, refusal=lambda q, k, plan, v: "no fp8" if k.dtype == FP8 else None)
    monkeypatch.setitem(dispatch.BACKENDS, "scanner", picky)
    assert torch.equal(msa.select_blocks(t.index_q, keys, plan, backend="scanner", **copies), wanted)
    assert len(seen) == 1


def test_the_op_is_well_formed_and_compiles():
    t, plan, keys, copies = problem(CHUNK)
    args = (plan.tensors(), plan.topk, copies["index_k_scale"], True, None)
    more = (copies["index_k_exact"], copies["index_k_error"])
    checks = ("test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")  # the schema's compares fp8
    torch.library.opcheck(
        torch.ops.openm3.select_blocks.default, (t.index_q, keys, *args, *more), test_utils=checks
    )  # fmt: skip
    torch._dynamo.reset()
    run = torch.compile(lambda: msa.select_blocks(t.index_q, keys, plan, **copies), backend="aot_eager", fullgraph=True)
    assert torch.equal(run(), msa.select_blocks(t.index_q, t.index_k, plan))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999), st.sampled_from([1e-6, 2.0**-9, 0.02, 1.0, 30.0]), st.sampled_from([None, 0.1, 3.0]))
def test_the_error_bounds_what_any_query_can_see_of_it(seed, size, scale):
    generator = torch.Generator().manual_seed(seed)
    exact = (torch.randn(3, 8, 16, generator=generator) * size).bfloat16()
    stored = (exact.float() / (scale or 1.0)).clamp(-448, 448).to(FP8)
    error = msa.index_error(exact, stored, scale)
    gap = exact.double() - stored.double() * (scale or 1.0)
    worst = gap.flatten(0, 1)[gap.norm(dim=-1).argmax()]  # no query sees more of a page's error than this one
    for q in (worst, torch.randn(16, generator=generator).double()):
        seen = (gap @ q).abs().amax(-1)
        assert (seen <= error.double() * q.norm()).all()
    assert float(error.max()) <= 1.01 * float(gap.norm(dim=-1).max()) + 2.0**-11 * float(
        exact.double().norm(dim=-1).max()
    )


@pytest.mark.parametrize("by_page", [False, True])
def test_the_copy_and_its_error_are_kept_up_token_by_token_and_a_page_begins_anew(by_page):
    case = CHUNK.but(lens_q=(37, 40, 64))
    t, table, block = case.tensors().in_pages(), case.page_table(), case.block
    pages = len(t.index_k)
    scale = 2.0**-8 * torch.ones(pages) if by_page else 2.0**-8  # keys beyond 1.75 are cut
    keys, error = torch.zeros(t.index_k.shape).to(FP8), torch.full((pages,), 1e9)  # what earlier owners left
    done = [0, 0, 0]
    for step in ((30, 40, 1), (0, 0, 7), (7, 0, 56)):
        ends = [a + n for a, n in zip(done, step)]
        plan = msa.Plan.paged(table, ends, [0, *torch.tensor(step).cumsum(0).tolist()], block_size=block, topk=3)
        msa.store_index_copy(keys, error, t.index_k, plan, scale)
        done = ends
    for s, n in enumerate(case.lens_k):
        for b, page in enumerate(table[s, : -(-n // block)].tolist()):
            mine = t.index_k[page, : n - b * block]
            assert torch.equal(keys[page, : len(mine)].float(), (mine * 256).clamp(-448, 448).to(FP8).float())
            assert not keys[page, len(mine) :].float().any()
            assert error[page] == _errors(mine, keys[page, : len(mine)], 2.0**-8).max()
    assert error[0] == 1e9  # nobody's page
    assert (error[1:] < 10).all()


def test_a_copy_that_does_not_fit_is_refused():
    _, plan, keys, copies = problem(CHUNK)
    error, exact = copies["index_k_error"], copies["index_k_exact"]
    with pytest.raises(ValueError, match=r"index_k_exact: .*, must be index_k's shape"):
        msa.store_index_copy(keys, error, exact[:, :, :8], plan)
    with pytest.raises(ValueError, match=r"index_k_scale: torch.float32 \[3\], must be float32 \[19\]"):
        msa.store_index_copy(keys, error, exact, plan, torch.ones(3))
    with pytest.raises(ValueError, match=r"plan.slots: the plan's keys are packed"):
        msa.store_index_copy(keys, error, exact, CHUNK.packed())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index_k_error": None}, "index_k_error: None, must be given where index_k_exact is"),
        ({"index_k_exact": None}, "index_k_exact: None, must be given where index_k_error is"),
        ({"index_k_exact": torch.zeros(19, 8, 15)}, r"index_k_exact: \[19, 8, 15\], must be index_k's shape"),
        ({"index_k_exact": torch.zeros(19, 8, 16).to(FP8)}, "index_k_exact: torch.float8_e4m3fn, must be one of"),
        ({"index_k_exact": torch.zeros(19, 8, 16, device="meta")}, "index_k_exact: on meta, must be on the plan's"),
        ({"index_k_error": torch.zeros(19, 8)}, r"index_k_error: torch.float32 \[19, 8\], must be float32 \[19\]"),
        ({"index_k_error": torch.zeros(19).double()}, r"index_k_error: torch.float64 \[19\], must be float32 \[19\]"),
        ({"index_k_error": torch.zeros(38)[::2]}, "index_k_error: stride 2 along its last axis, must be 1"),
    ],
)
def test_what_cannot_be_is_refused_by_name_and_value(change, message):
    t, plan, keys, copies = problem(CHUNK)
    assert len(keys) == 19
    with pytest.raises(ValueError, match=message):
        msa.select_blocks(t.index_q, keys, plan, **copies | change)


def test_exact_keys_beside_pages_that_are_not_fp8_are_refused():
    t, plan, _, copies = problem(CHUNK)
    with pytest.raises(ValueError, match=r"index_k_exact: given, but index_k is torch\.float32"):
        msa.select_blocks(t.index_q, t.index_k, plan, **copies | {"index_k_scale": None})
