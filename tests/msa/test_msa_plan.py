"""Plans and the operator's public edge: what a plan knows, and bad input refused before any compute."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from msa_cases import Case, cases, offsets

from openm3 import msa
from openm3.msa import Plan

SIZES = dict(block_size=8, topk=3)
TABLE = torch.zeros(1, 4, dtype=torch.int32)


def test_queries_are_the_last_tokens_of_their_sequence():
    plan = Plan.packed([0, 2, 2, 5], [0, 10, 13, 16], **SIZES)
    assert plan.positions.tolist() == [8, 9, 0, 1, 2]
    assert plan.seq_ids.tolist() == [0, 0, 2, 2, 2]
    assert (plan.lens_q, plan.lens_k) == ((2, 0, 3), (10, 3, 3))
    assert (plan.max_q, plan.max_k, plan.num_queries) == (3, 10, 5)
    assert plan.cu_seqlens_k.tolist() == [0, 10, 13, 16]
    assert plan.cu_seqlens_q.dtype == torch.int32


def test_without_other_offsets_the_keys_are_the_queries():
    plan = Plan.packed(torch.tensor([0, 4, 6], dtype=torch.int32), **SIZES)
    assert plan.lens_k == plan.lens_q == (4, 2)
    assert plan.positions.tolist() == [0, 1, 2, 3, 0, 1]


@settings(deadline=None, max_examples=40)
@given(cases())
def test_slots_are_where_the_page_table_puts_each_query(case):
    plan, table = case.paged(), case.page_table()
    wanted = [
        int(table[s, p // case.block]) * case.block + p % case.block
        for s, p in zip(plan.seq_ids.tolist(), plan.positions.tolist())
    ]
    assert plan.slots.tolist() == wanted


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan.packed([], **SIZES), "cu_seqlens_q"),
        (lambda: Plan.packed([1, 5], **SIZES), "must start with 0"),
        (lambda: Plan.packed([0, 5, 3], **SIZES), "length -2"),
        (lambda: Plan.packed([0, 5], [0, 4], **SIZES), "5 queries but 4 keys"),
        (lambda: Plan.packed([0, 5], [0, 5, 9], **SIZES), "1 sequences of queries but 2"),
        (lambda: Plan.packed([0, 5], block_size=0, topk=3), "block_size = 0"),
        (lambda: Plan.packed([0, 5], block_size=8, topk=2.0), "topk = 2.0"),
        (lambda: Plan.packed([0, 5], **SIZES, local_blocks=0), "local_blocks = 0"),
        (lambda: Plan.packed([0, 5], **SIZES, local_blocks=2, init_blocks=2), "may not exceed topk = 3"),
        (lambda: Plan.packed([0, 5], **SIZES, workspace_bytes=1000), "workspace_bytes = 1000"),
        (lambda: Plan.packed([0, 2], **SIZES, positions=torch.tensor([0.0, 1.0])), "float32"),
        (lambda: Plan.packed([0, 2], **SIZES, positions=torch.tensor([0, 1, 2])), "int64 \\[2\\]"),
        (lambda: Plan.packed([0, 2], [0, 6], **SIZES, positions=torch.tensor([5, 6])), "positions\\[1\\] = 6"),
        (lambda: Plan.paged(TABLE.long(), [9], [0, 2], **SIZES), "int64 \\[1, 4\\], must be int32"),
        (lambda: Plan.paged(TABLE, [33], [0, 2], **SIZES), "4 pages of 8 a sequence, a sequence has 33"),
        (lambda: Plan.paged(TABLE, [9, 9], [0, 2, 4], **SIZES), "must be int32 \\[2, max_pages\\]"),
        (lambda: Plan.packed([0, 2], **SIZES).slots, "only a paged plan has slots"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


CASE = Case((5,), (20,))
BLOCKS = torch.zeros(2, 5, 3, dtype=torch.int32)


def select(**change):
    t = CASE.tensors()
    given = dict(index_q=t.index_q, index_k=t.index_k) | change
    return msa.select_blocks(given["index_q"], given["index_k"], CASE.packed())


def attend(**change):
    t = CASE.tensors()
    given = dict(q=t.q, k=t.k, v=t.v, blocks=BLOCKS) | change
    return msa.sparse_attention(given["q"], given["k"], given["v"], given["blocks"], CASE.packed())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: select(index_q=torch.zeros(4, 2, 16)), "index_q: \\[4, 2, 16\\], must be \\[5, heads, dim\\]"),
        (lambda: select(index_k=torch.zeros(19, 16)), "index_k: \\[19, 16\\], must have 2 axes and 20 keys"),
        (lambda: select(index_k=torch.zeros(20, 8)), "index_k: dim 8, must be index_q's 16"),
        (lambda: attend(q=torch.zeros(5, 64)), "q: \\[5, 64\\]"),
        (lambda: attend(q=torch.zeros(5, 5, 16)), "heads must be a multiple of KV heads"),
        (lambda: attend(k=torch.zeros(20, 2, 8), v=torch.zeros(20, 2, 8)), "dims equal"),
        (lambda: attend(v=torch.zeros(20, 2, 8)), "must be k's shape"),
        (lambda: attend(blocks=BLOCKS.long()), "int64 \\[2, 5, 3\\], must be int32"),
        (lambda: attend(blocks=BLOCKS[:, :4]), "must be int32 \\[Hi, 5, 3\\]"),
        (lambda: attend(blocks=BLOCKS.repeat(2, 1, 1)), "4 index heads, must divide 2 KV heads"),
        (lambda: attend(k=torch.zeros(2, 2, 8, 16), v=torch.zeros(2, 2, 8, 16)), "3 axes"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_the_shape(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pages_of_another_size_than_the_blocks_are_refused():
    t, plan = CASE.tensors().in_pages(), CASE.paged()
    with pytest.raises(ValueError, match="pages of 8 tokens"):
        msa.dense_attention(t.q, t.k[:, :, :4], t.v[:, :, :4], plan)
    with pytest.raises(ValueError, match="training runs on packed keys"):
        msa.index_loss(t.index_q, t.index_k, t.q, t.k, None, plan)


def test_an_unknown_backend_names_the_known_ones():
    t = CASE.tensors()
    with pytest.raises(ValueError, match="backend = 'cuda': must be one of reference, torch"):
        msa.select_blocks(t.index_q, t.index_k, CASE.packed(), backend="cuda")


def test_the_backend_taken_is_said_once_in_the_log(caplog, monkeypatch):
    monkeypatch.setattr(msa.dispatch, "_announced", set())
    t = CASE.tensors()
    with caplog.at_level("INFO", logger="openm3.msa"):
        for _ in range(3):
            msa.select_blocks(t.index_q, t.index_k, CASE.packed())
    assert [record.getMessage() for record in caplog.records] == ["openm3.msa: backend torch on cpu"]


def test_a_run_without_queries_gives_nothing():
    case = Case((0, 0), (9, 4))
    t, plan = case.tensors(), case.packed()
    assert plan.num_queries == 0
    assert offsets(plan.lens_q) == [0, 0, 0]
    blocks = msa.select_blocks(t.index_q, t.index_k, plan)
    assert blocks.shape == (2, 0, 3)
    assert msa.sparse_attention(t.q, t.k, t.v, blocks, plan).shape == (0, 4, 16)
    assert msa.dense_attention(t.q, t.k, t.v, plan).shape == (0, 4, 16)
