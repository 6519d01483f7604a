"""Decode in C on a CPU: the definition at any size, the same bits on any number of threads, no page out of place."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msa_cases import Case, random_blocks, relative

from openm3 import msa
from openm3.msa import cpu_decode, reference

needs_library = pytest.mark.skipif(cpu_decode.library() is None, reason="installed without a C compiler")
LONG = Case((1, 1), (9001, 300), d=64, di=64, group=4, block=128, topk=16)


@st.composite
def decodes(draw) -> Case:
    block = draw(st.sampled_from([1, 8, 24, 128, 256]))
    lens = draw(st.lists(st.integers(1, 40 * block), min_size=1, max_size=4))
    hi = draw(st.sampled_from([1, 2, 3, 5]))
    return Case(
        (1,) * len(lens), tuple(lens), hkv=hi * draw(st.sampled_from([1, 2])), hi=hi,
        group=draw(st.sampled_from([1, 2, 4, 7, 16])), d=draw(st.sampled_from([16, 64, 80, 128])),
        di=draw(st.sampled_from([16, 48, 64, 128])), block=block, topk=draw(st.integers(1, 9)),
        shuffled=draw(st.booleans()), dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        positions=draw(st.sampled_from([None, tuple(draw(st.integers(-1, n - 1)) for n in lens)])),
        seed=draw(st.integers(0, 1000)),
    )  # fmt: skip


def attend(t, blocks, plan):
    """(output, lse) over given blocks, or all of them."""
    assert cpu_decode.fits(t.q, t.k, plan)
    return cpu_decode.attention(t.q, t.k, t.v, blocks, plan, 0.1)


@needs_library
@settings(deadline=None, max_examples=60)
@given(decodes())
@example(LONG)
@example(LONG.but(dtype=torch.bfloat16))
def test_attention_is_the_references(case):
    plan = case.paged()
    for by_head in (True, False):
        t = case.tensors().in_pages(by_head)
        for blocks in (None, random_blocks(case, plan, case.seed)):
            out, lse = attend(t, blocks, plan)
            wide = t.double()
            wanted, wanted_lse = reference.attention(wide.q, wide.k, wide.v, blocks, plan, 0.1)
            assert out.dtype == case.dtype
            assert relative(out, wanted) <= (5e-3 if case.dtype == torch.bfloat16 else 1e-5)
            assert torch.allclose(lse.double(), wanted_lse.double(), rtol=1e-5, atol=1e-5)


@needs_library
@settings(deadline=None, max_examples=60)
@given(decodes())
@example(LONG)
def test_selection_is_the_references_bit_for_bit_where_sums_are_exact(case):
    t, plan = case.but(integers=True).tensors().in_pages(), case.paged()
    assert cpu_decode.fits(t.index_q, t.index_k, plan)
    wanted = msa.select_blocks(t.index_q, t.index_k, plan, return_scores=True, backend="reference")
    found = msa.select_blocks(t.index_q, t.index_k, plan, return_scores=True, backend="torch")
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1].float())


@needs_library
@pytest.mark.parametrize("own", [False, True], ids=["PyTorch's threads", "threads of its own"])
def test_the_number_of_threads_changes_no_bit(own, monkeypatch):
    t, plan = LONG.tensors().in_pages(), LONG.paged()
    blocks = random_blocks(LONG, plan)
    monkeypatch.setattr(cpu_decode, "THREAD_BYTES", 1)
    if own:
        monkeypatch.setattr(cpu_decode, "_openmp", lambda: None)

    def results(threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        scores = cpu_decode.block_scores(t.index_q, t.index_k, plan)
        return [scores, *attend(t, None, plan), *attend(t, blocks, plan)]

    alone = results(1)
    for threads in (2, 3, 64):
        assert all(torch.equal(x, y) for x, y in zip(alone, results(threads)))


@needs_library
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_is_not_a_number_shows(where):
    case = LONG.but(lens_k=(900, 300))
    t, plan = case.tensors().in_pages(), case.paged()
    page = int(plan.page_table[0, 3])
    at = {"q": 0, "k": (page, 0, 5), "v": (page, 0, 5)}[where]
    getattr(t, where)[at] = float("nan")
    out, _ = attend(t, None, plan)
    assert bool(out[0, : case.group].isnan().all())
    assert bool(out[1].isfinite().all())


@needs_library
@pytest.mark.parametrize("page", [-1, 10_000, 2**31 - 1])
def test_a_page_that_is_not_there_is_an_error(page):
    t, plan = LONG.tensors().in_pages(), LONG.paged()
    plan.page_table[0, 40] = page
    for call in (lambda: attend(t, None, plan), lambda: msa.select_blocks(t.index_q, t.index_k, plan)):
        with pytest.raises(ValueError, match="page_table: names pages outside of the cache's"):
            call()
    plan = LONG.paged()
    plan.page_table[1, 40] = page  # behind the end of that sequence
    attend(t, None, plan)


def test_without_the_library_pytorch_serves(monkeypatch):
    t, plan = LONG.tensors().in_pages(), LONG.paged()

    def results():
        blocks = msa.select_blocks(t.index_q, t.index_k, plan)
        return blocks, msa.sparse_attention(t.q, t.k, t.v, blocks, plan), msa.dense_attention(t.q, t.k, t.v, plan)

    with_library = results()
    monkeypatch.setattr(cpu_decode, "library", lambda: None)
    assert not cpu_decode.fits(t.q, t.k, plan)
    without = results()
    assert torch.equal(with_library[0], without[0])
    assert all(relative(x, y) <= 1e-5 for x, y in zip(with_library[1:], without[1:]))


@pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("clang")), reason="no C compiler")
def test_an_installation_with_a_compiler_has_the_library():
    assert cpu_decode.library() is not None
