"""Selection: the torch backend against the definition, bit for bit where sums are exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from msa_cases import Case, cases

from openm3.msa import Plan, decode, select_blocks, selection

RUN = settings(deadline=None, max_examples=60)
CHUNK = Case((5, 16, 1), (37, 40, 64), integers=True)


def both(tensors, plan, **more):
    reference = select_blocks(tensors.index_q, tensors.index_k, plan, return_scores=True, backend="reference", **more)
    found = select_blocks(tensors.index_q, tensors.index_k, plan, return_scores=True, backend="torch", **more)
    unscored = select_blocks(tensors.index_q, tensors.index_k, plan, backend="torch", **more)
    return reference, found, unscored


def assert_same_selection(tensors, plan, **more):
    (blocks, scores), (found, found_scores), unscored = both(tensors, plan, **more)
    assert found.dtype == blocks.dtype == torch.int32
    assert torch.equal(found, blocks)
    assert torch.equal(found_scores, scores)
    assert torch.equal(unscored, blocks)


@RUN
@given(cases(integers=True))
@example(CHUNK)
@example(CHUNK.but(topk=1))
@example(CHUNK.but(topk=20))  # more slots than there are blocks
@example(CHUNK.but(hi=1, hkv=4))
@example(CHUNK.but(lens_q=(1, 1, 1)))
@example(CHUNK.but(topk=4, local=2, init=2))
@example(Case((40,), (40,), integers=True, positions=tuple(range(39, -1, -1))))
def test_packed_selection_equals_the_definition_bit_for_bit(case):
    assert_same_selection(case.tensors(), case.packed())


@RUN
@given(cases(integers=True))
@example(CHUNK)
@example(CHUNK.but(shuffled=False))
@example(CHUNK.but(lens_q=(1, 1, 1)))
@example(CHUNK.but(lens_q=(1, 1, 1), lens_k=(4097, 9, 4099)))  # too long to be gathered in decode
@example(CHUNK.but(topk=4, local=2, init=2, lens_q=(1, 1, 1)))
def test_selection_over_pages_equals_the_definition_bit_for_bit(case):
    assert_same_selection(case.tensors().in_pages(), case.paged())


@RUN
@given(cases(integers=True))
def test_pages_and_packed_keys_select_the_same(case):
    packed = select_blocks(case.tensors().index_q, case.tensors().index_k, case.packed())
    pages = case.tensors().in_pages()
    assert torch.equal(select_blocks(pages.index_q, pages.index_k, case.paged()), packed)


@RUN
@given(cases(integers=True))
def test_the_selection_is_what_the_definition_says(case):
    """The reference too: recomputed for each query by sorting a Python list."""
    tensors, plan = case.tensors(), case.packed()
    blocks = select_blocks(tensors.index_q, tensors.index_k, plan, backend="reference")
    starts = plan.starts_k()
    for t in range(0, plan.num_queries, 7):
        s, i = int(plan.seq_ids[t]), int(plan.positions[t])
        keys = tensors.index_k[starts[s] : starts[s] + i + 1]
        own = i // case.block
        for h in range(case.hi):
            found = [float((piece @ tensors.index_q[t, h]).max()) for piece in keys.split(case.block)]
            forced = {b for b in range(own + 1) if b < case.init or b > own - case.local}
            order = sorted(range(own + 1), key=lambda b: (b not in forced, -found[b], b))
            assert [b for b in blocks[h, t].tolist() if b >= 0] == sorted(order[: case.topk])


def test_a_query_selects_the_same_in_a_chunk_and_in_the_whole():
    whole = Case((53,), (53,), integers=True)
    tensors = whole.tensors()
    all_of_them = select_blocks(tensors.index_q, tensors.index_k, whole.packed())
    for first, last in ((0, 7), (7, 8), (8, 31), (31, 53)):
        plan = Plan.packed([0, last - first], [0, last], block_size=8, topk=3)
        part = select_blocks(tensors.index_q[first:last], tensors.index_k[:last], plan)
        assert torch.equal(part, all_of_them[:, first:last])


@pytest.mark.parametrize("lens_q", [(64,), (9,), (1,)])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(("topk", "local", "init"), [(3, 1, 0), (4, 2, 1), (5, 1, 3)])
def test_ties_go_to_the_lower_block(lens_q, paged, topk, local, init):
    case = Case(lens_q, (64,), topk=topk, local=local, init=init)
    tensors = case.tensors()
    tensors.index_k.fill_(1.0)  # every block of every query scores the same
    tensors = tensors.in_pages() if paged else tensors
    plan = case.paged() if paged else case.packed()
    for backend in ("reference", "torch"):
        blocks = select_blocks(tensors.index_q, tensors.index_k, plan, return_scores=True, backend=backend)[0]
        for t, own in enumerate((plan.positions // 8).tolist()):
            forced = {*range(max(0, own - local + 1), own + 1), *range(min(init, own + 1))}
            rest = [b for b in range(own + 1) if b not in forced]
            wanted = sorted(forced | set(rest[: topk - len(forced)]))
            assert blocks[0, t].tolist() == wanted + [-1] * (topk - len(wanted))


def test_a_tie_at_the_last_slot_goes_to_the_lower_block_and_better_blocks_keep_theirs():
    case = Case((1,), (48,), hi=1, hkv=1, di=1, topk=4)
    scores = torch.tensor([2.0, 5.0, 2.0, 7.0, 2.0, 0.0]).repeat_interleave(8)[:, None]
    for backend in ("reference", "torch"):
        blocks = select_blocks(torch.ones(1, 1, 1), scores, case.packed(), backend=backend)
        assert blocks.tolist() == [[[0, 1, 3, 5]]]


@RUN
@given(cases())
@example(Case((40, 9), (90, 77), block=16))
def test_float_selections_differ_only_where_scores_are_closer_than_float32_rounding(case):
    tensors = case.tensors()
    half = len(tensors.index_k) // 2
    tensors.index_k[half : 2 * half] = tensors.index_k[:half] * (1 + 2**-23)  # blocks that nearly tie
    plan = case.packed()
    wide = tensors.double()
    wanted, wanted_scores = select_blocks(wide.index_q, wide.index_k, plan, return_scores=True, backend="reference")
    found, scores = select_blocks(tensors.index_q, tensors.index_k, plan, return_scores=True, backend="torch")
    rounding = 2 * (case.di + 1) * 2**-24 * tensors.index_q.abs().sum(-1).T * tensors.index_k.abs().max()  # [Hi, T]
    same = (wanted == found).all(-1)
    gap = (wanted_scores - scores).masked_fill(wanted < 0, 0.0).abs().amax(-1)
    assert bool((gap <= rounding)[same].all())
    for h, t in (~same).nonzero().tolist():
        ours, theirs = set(found[h, t].tolist()), set(wanted[h, t].tolist())
        lowest = {int(b): float(s) for b, s in zip(wanted[h, t], wanted_scores[h, t])}
        mine = {int(b): float(s) for b, s in zip(found[h, t], scores[h, t])}
        dropped, taken = [lowest[b] for b in theirs - ours], [mine[b] for b in ours - theirs]
        assert len(dropped) == len(taken)
        assert max(dropped) - min(taken) <= 2 * rounding[h, t]


@pytest.mark.parametrize("scale", ["none", "number", "scalar", "each page"])
@pytest.mark.parametrize("lens_q", [(1, 1, 1), (3, 9, 30)])
def test_fp8_index_keys_select_as_the_definition_says(scale, lens_q):
    case = Case(lens_q, (33, 64, 41), integers=True)
    tensors = case.tensors().in_pages()
    pages = tensors.index_k.to(torch.float8_e4m3fn)
    scales = {
        "none": None, "number": 0.5, "scalar": torch.tensor(0.25),
        "each page": 2.0 ** (torch.arange(len(pages)) % 4),
    }  # fmt: skip
    plan, scale = case.paged(), scales[scale]
    reference = select_blocks(
        tensors.index_q, pages, plan, index_k_scale=scale, return_scores=True, backend="reference"
    )
    found = select_blocks(tensors.index_q, pages, plan, index_k_scale=scale, return_scores=True)
    assert torch.equal(found[0], reference[0])
    assert torch.equal(found[1], reference[1])


def test_cutting_the_work_into_pieces_changes_nothing(monkeypatch):
    case = Case((130, 70), (130, 200), integers=True, topk=5)
    tensors, pages = case.tensors(), case.tensors().in_pages()
    packed = select_blocks(tensors.index_q, tensors.index_k, case.packed(), return_scores=True)
    monkeypatch.setattr(selection, "STRIP", 16)
    monkeypatch.setattr(selection, "PIECE_BYTES", 4096)
    for plan, t in ((case.but(workspace=1 << 20).packed(), tensors), (case.paged(), pages)):
        again = select_blocks(t.index_q, t.index_k, plan, return_scores=True)
        assert torch.equal(again[0], packed[0])
        assert torch.equal(again[1], packed[1])


@pytest.mark.parametrize("lens", [(70, 3, 64, 65, 24, 25), (8,), (200, 9)])
@pytest.mark.parametrize("workspace", [1 << 20, 1 << 30])
def test_whole_sequences_scored_in_batches_as_on_a_gpu_select_the_same(lens, workspace):
    case = Case(lens, lens, integers=True, workspace=workspace)
    tensors, plan = case.tensors(), case.packed()
    wanted, scores = select_blocks(tensors.index_q, tensors.index_k, plan, return_scores=True, backend="reference")
    for over in (0, case.topk * case.block):
        seen = torch.zeros(sum(lens), dtype=torch.int64)
        for rows, found in selection._whole_sequences(tensors.index_q, tensors.index_k, plan, over):
            blocks, values = selection.pick_blocks(found, plan.positions[rows] // case.block, plan)
            assert torch.equal(blocks, wanted[:, rows])
            assert torch.equal(values, scores[:, rows])
            seen[rows] += 1
        assert torch.equal(seen, (plan.positions >= over).long())


def test_block_scores_of_decode_are_cut_under_the_workspace():
    case = Case((1,) * 9, (600,) * 9, integers=True, di=64, workspace=1 << 20)
    tensors, plan = case.tensors().in_pages(), case.paged()
    assert decode.fits(plan)
    assert_same_selection(tensors, plan)


def test_rows_before_the_first_key_select_nothing():
    case = Case((3,), (30,), integers=True, positions=(-1, 29, -8))
    blocks = select_blocks(case.tensors().index_q, case.tensors().index_k, case.packed())
    assert (blocks[:, [0, 2]] == -1).all()
    assert (blocks[:, 1] >= 0).all()
    assert_same_selection(case.tensors(), case.packed())


def test_the_same_input_gives_the_same_bits():
    case = Case((90, 1), (130, 70))
    tensors, plan = case.tensors(), case.packed()
    once, twice = (select_blocks(tensors.index_q, tensors.index_k, plan, return_scores=True) for _ in range(2))
    assert torch.equal(once[0], twice[0])
    assert torch.equal(once[1], twice[1])


def test_selection_takes_half_precision_and_strided_keys():
    case = Case((40,), (40,), integers=True, dtype=torch.bfloat16)
    tensors, plan = case.tensors(), case.packed()
    wide = torch.stack((tensors.index_k, tensors.index_k + 1), dim=1)
    reference = select_blocks(tensors.index_q, tensors.index_k, plan, backend="reference")
    assert torch.equal(select_blocks(tensors.index_q, wide[:, 0], plan), reference)
