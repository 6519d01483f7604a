"""The k best blocks of each row of scores, on Hopper: the few rows of a decode step, the many of a prompt's tiles.

A row's scores are read once, into registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from openm3.msa.triton_select import _place, _ranks

INF = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(-(2**31))  # below the rank of any score
FORCED = tl.constexpr(2**31 - 2)
BEYOND = tl.constexpr(2**30)  # above every block


@triton.jit
def enter(PDL: tl.constexpr):
    """The next kernel may be set up; this one goes on when the one before it has written what it writes."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def queries_of(cu_q_ptr, seq, EACH: tl.constexpr):
    """The first query token of a sequence and how many it has: EACH, or 0 where they differ."""
    if EACH:
        return seq * EACH, EACH
    else:
        first = tl.load(cu_q_ptr + seq)
        return first, tl.load(cu_q_ptr + seq + 1) - first


@triton.jit
def _choose(
    row, lane, position, blocks_ptr, values_ptr, BLOCK: tl.constexpr, TOPK: tl.constexpr, LOCAL: tl.constexpr,
    INIT: tl.constexpr, CHUNK: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Of CHUNK blocks of a row, `lane`, ascending: the TOPK best, ascending; ties to the lower one.

    The rank of the last block to be taken is found by bisection. It starts near: each of TOPK groups of blocks has one
    at least as good as the worst group's best, and none is better than the best of all.
    """
    seen = (position + BLOCK) // BLOCK
    rank = _ranks(row, lane, seen, LOCAL, INIT)
    low = tl.full([], LOWEST, tl.int32)
    if seen > TOPK:
        # At least TOPK blocks rank as high as `low`, at most TOPK as high as `high`.
        low = tl.min(tl.max(tl.reshape(rank, [CHUNK // TOPK, TOPK]), 0), 0)
        high = tl.max(tl.where(rank == FORCED, LOWEST, rank), 0) + 1
        low = tl.minimum(low, high - 1)
        middle = (low & high) + ((low ^ high) >> 1)
        while middle != low:
            count = tl.sum((rank >= middle).to(tl.int32), 0)
            low = tl.where(count >= TOPK, middle, low)
            high = tl.where(count > TOPK, high, middle)
            middle = (low & high) + ((low ^ high) >> 1)
    room = TOPK - tl.sum((rank > low).to(tl.int32), 0)
    slots = tl.arange(0, TOPK)
    none = slots >= tl.minimum(seen, TOPK)
    tl.store(blocks_ptr + slots, tl.full([TOPK], -1, tl.int32), mask=none)
    if VALUES:
        tl.store(values_ptr + slots, tl.full([TOPK], -INF, tl.float32), mask=none)
    _place(row, rank, lane, seen, low, room, 0, blocks_ptr, values_ptr, VALUES)


@triton.jit(do_not_specialize=["width", "tokens"])
def pick_step(
    scores_ptr, list_ptr, length_ptr, blocks_ptr, values_ptr, cu_q_ptr, positions_ptr, width, tokens,
    EACH: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TOPK: tl.constexpr,
    LOCAL: tl.constexpr, INIT: tl.constexpr, CHUNK: tl.constexpr, SHORT: tl.constexpr, VALUES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A decode step's row: scores lie as [sequences, ROWS, width], a row is (query, index head). With SHORT, only the
    blocks of a list can be among the best, and one of at most SHORT of them is looked at alone."""
    enter(PDL)
    seq, r = tl.program_id(1), tl.program_id(0)
    first, count = queries_of(cu_q_ptr, seq, EACH)
    if r < count * HEADS:
        token = (first + r // HEADS).to(tl.int64)
        row, to = (seq * ROWS + r).to(tl.int64) * width, ((r % HEADS).to(tl.int64) * tokens + token) * TOPK
        scores_ptr += row
        blocks_ptr += to
        values_ptr += to
        position = tl.load(positions_ptr + token).to(tl.int32)
        length = tl.load(length_ptr + seq * ROWS + r) if SHORT else width
        if SHORT and length <= SHORT:
            at = tl.arange(0, SHORT)
            few = tl.load(list_ptr + row + at, mask=at < length, other=BEYOND)
            _choose(scores_ptr, few, position, blocks_ptr, values_ptr, BLOCK, TOPK, LOCAL, INIT, SHORT, VALUES)
        else:
            lane = tl.arange(0, CHUNK)
            _choose(scores_ptr, lane, position, blocks_ptr, values_ptr, BLOCK, TOPK, LOCAL, INIT, CHUNK, VALUES)


@triton.jit(do_not_specialize=["tokens", "tile_start", "tile_rows"])
def pick_rows(
    scores_ptr, blocks_ptr, values_ptr, first_ptr, count_ptr, base_ptr, width_ptr, positions_ptr, tokens, tile_start,
    tile_rows, HEADS: tl.constexpr, BLOCK: tl.constexpr, TOPK: tl.constexpr, LOCAL: tl.constexpr,
    INIT: tl.constexpr, CHUNK: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """A row of a tile, whose scores lie as [rows, its width] at its base."""
    tile = tl.program_id(0) // tile_rows + tile_start
    r = tl.program_id(0) % tile_rows
    if r < tl.load(count_ptr + tile) * HEADS:
        token = (tl.load(first_ptr + tile) + r // HEADS).to(tl.int64)
        at = ((r % HEADS).to(tl.int64) * tokens + token) * TOPK
        row = scores_ptr + tl.load(base_ptr + tile) + r.to(tl.int64) * tl.load(width_ptr + tile)
        position = tl.load(positions_ptr + token).to(tl.int32)
        lane = tl.arange(0, CHUNK)
        _choose(row, lane, position, blocks_ptr + at, values_ptr + at, BLOCK, TOPK, LOCAL, INIT, CHUNK, VALUES)
