"""Exact selection from fp8 index keys, on Hopper: what follows a scan of them, for a decode step.

    score_step      (`hopper_decode.py`) an upper bound of each block's exact score, and its best fp8 key
    shortlist_step  a lower bound of the k-th best exact score; the blocks whose upper bound reaches it, listed
    rescore_step    these blocks' exact scores, from the exact keys
    pick_step       (`hopper_pick.py`) the k best, as ever

How many blocks are listed is known to the device alone: grids are made for all of them, and end early.
"""

from __future__ import annotations

import triton
import triton.language as tl

from openm3.msa.hopper_decode import INF, TINY, index_rows, nth, page_scores
from openm3.msa.hopper_pick import FORCED, LOWEST, enter, queries_of
from openm3.msa.triton_select import in_order

ROUNDING = tl.constexpr(2.0**-13)  # of |q_i k_i| summed: what two float32 sums of at most 256 numbers may differ by


@triton.jit(do_not_specialize=["table_row", "width"])
def shortlist_step(
    q_ptr, k_ptr, bounds_ptr, list_ptr, length_ptr, cu_q_ptr, positions_ptr, table_ptr, q_token, q_head, k_page,
    k_token, table_row, width, EACH: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, TOPK: tl.constexpr, LOCAL: tl.constexpr, INIT: tl.constexpr, PIECE: tl.constexpr,
    GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: (query, index head). Any TOPK blocks bound the k-th best score from below by the worst of their own
    lower bounds, and a block's is the exact score of any one of its keys. Of GROUPS disjoint groups of blocks each
    offers its most promising block and there the best fp8 key; the TOPK best of these keys make the bar.

    What is not listed gets the bar for its score: lower bounds are below all scores, so `pick_step` passes it over.
    """
    enter(PDL)
    seq, r = tl.program_id(1), tl.program_id(0)
    first, count = queries_of(cu_q_ptr, seq, EACH)
    if r < count * HEADS:
        token = (first + r // HEADS).to(tl.int64)
        seen = (tl.load(positions_ptr + token).to(tl.int32) + BLOCK) // BLOCK
        row = (seq * ROWS + r).to(tl.int64) * width
        best = tl.full([GROUPS], LOWEST, tl.int32)
        block = tl.zeros([GROUPS], tl.int32)
        for start in range(0, seen, PIECE):
            lane = start + tl.arange(0, PIECE)
            rank = tl.load(bounds_ptr + row + lane, mask=lane < seen, other=LOWEST)
            rank = tl.where((lane < seen) & ((lane < INIT) | (lane >= seen - LOCAL)), FORCED, rank)
            rank = tl.reshape(rank, [PIECE // GROUPS, GROUPS])
            lane = tl.reshape(lane, [PIECE // GROUPS, GROUPS])
            here = tl.max(rank, 0)
            block = tl.where(here > best, tl.min(tl.where(rank == here[None], lane, FORCED), 0), block)
            best = tl.maximum(best, here)
        free = (best > LOWEST) & (best < FORCED)
        page = tl.load(table_ptr + seq.to(tl.int64) * table_row + block, mask=free, other=0).to(tl.int64)
        d = tl.arange(0, D)
        q = tl.load(q_ptr + token * q_token + (r % HEADS) * q_head + d).to(tl.float32)
        k_at = k_ptr + page * k_page + (best & (BLOCK - 1)) * k_token
        products = tl.load(k_at[:, None] + d[None], mask=free[:, None], other=0.0).to(tl.float32) * q[None]
        lower = tl.sum(products, 1) - ROUNDING * tl.sum(tl.abs(products), 1) - TINY
        lower = tl.where(free & (lower == lower), lower, tl.where(best == FORCED, INF, -INF))
        above = tl.sum((lower[None] > lower[:, None]).to(tl.int32), 1)
        bar = tl.min(tl.where(above < TOPK, lower, INF), 0)

        length = tl.zeros([], tl.int32)
        for start in range(0, seen, PIECE):
            lane = start + tl.arange(0, PIECE)
            upper = tl.load(bounds_ptr + row + lane, mask=lane < seen, other=LOWEST)
            within = in_order(upper & -BLOCK).to(tl.float32, bitcast=True) >= bar
            listed = (lane < seen) & ((lane < INIT) | (lane >= seen - LOCAL) | within)
            place = length + tl.cumsum(listed.to(tl.int32), 0) - 1
            tl.store(list_ptr + row + place, lane, mask=listed)
            tl.store(bounds_ptr + row + lane, bar.to(tl.int32, bitcast=True) + lane * 0, mask=(lane < seen) & ~listed)
            length += tl.sum(listed.to(tl.int32), 0)
        tl.store(length_ptr + seq * ROWS + r, length)


@triton.jit(do_not_specialize=["table_row", "width"])
def rescore_step(
    q_ptr, k_pages, list_ptr, length_ptr, scores_ptr, cu_q_ptr, positions_ptr, table_ptr, q_token, q_head, table_row,
    width, EACH: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
    SPAN: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Every n-th block of one row's list, at most SPAN: its score as `score_step` has it from the same keys."""
    enter(PDL)
    part, r, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _first, count = queries_of(cu_q_ptr, seq, EACH)
    if r < count * HEADS:
        row = (seq * ROWS + r).to(tl.int64) * width
        length = tl.load(length_ptr + seq * ROWS + r)
        at = part + tl.arange(0, SPAN) * tl.num_programs(0)
        listed = tl.load(list_ptr + row + at, mask=at < length, other=0)
        pages = tl.load(table_ptr + seq.to(tl.int64) * table_row + listed, mask=at < length, other=0)
        q, position, _real = index_rows(q_ptr, cu_q_ptr, positions_ptr, seq, q_token, q_head, EACH, HEADS, ROWS, D)
        q = q.to(DOT)
        mine = tl.arange(0, ROWS) == r
        for n in tl.range(0, tl.cdiv(length - part, tl.num_programs(0)), num_stages=STAGES):
            block, page = nth(listed, n, SPAN), nth(pages, n, SPAN)
            scores = page_scores(k_pages, page, block, q, position, BLOCK, D, DOT)
            tl.store(scores_ptr + row + block + tl.arange(0, ROWS) * 0, tl.max(scores, 0), mask=mine)
