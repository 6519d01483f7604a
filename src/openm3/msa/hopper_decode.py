"""Decode on Hopper: a few query tokens a sequence over long paged caches, bound by the bytes it reads.

    score_step    every index key once, the context split over the card: each block's best score, [B, rows, blocks]
                  (fp8 keys, exact selection: a bound of it; then `hopper_exact.py` scores again what may be chosen)
    pick_step     the k best of each row (`hopper_pick.py`)
    attend_step   the selected blocks (or all blocks) of one KV head, split over the card
    combine_step  the parts of a split, joined by their log-sum-exp

Pages come in through tensor maps, several in flight. Keys are the tall operand of each product and the few queries the
narrow one, so nothing is padded to the tensor cores' 64 rows. Grids follow from the plan's sizes on the host; lengths
are read on the device. With PDL each kernel is set up while the one before it still runs, and waits for its results.
"""

from __future__ import annotations

import triton
import triton.language as tl

from openm3.msa.hopper_pick import enter, queries_of
from openm3.msa.triton_select import in_order, to_dot

INF = tl.constexpr(float("inf"))
EXPONENT = tl.constexpr(0x7F800000)  # the bits of a positive float32 that make it a power of two
LARGEST = tl.constexpr(3.4e38)
TINY = tl.constexpr(2.0**-100)  # more than what products may lose that are too small for float32
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def nth(listed, n, SPAN: tl.constexpr):
    """Entry n of a list in registers: a load in the loop would take a stage of its pipeline from the keys."""
    return tl.sum(tl.where(tl.arange(0, SPAN) == n, listed, 0), 0)


@triton.jit
def index_rows(
    q_ptr, cu_q_ptr, positions_ptr, seq, q_token, q_head, EACH: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """A sequence's (query, index head) rows: its queries [D, ROWS], their positions (-1 for none), which are real."""
    first, count = queries_of(cu_q_ptr, seq, EACH)
    rows = tl.arange(0, ROWS)
    real = rows < count * HEADS
    token = first + rows // HEADS
    position = tl.load(positions_ptr + token, mask=real, other=-1).to(tl.int32)
    d = tl.arange(0, D)
    q_at = q_ptr + token.to(tl.int64) * q_token + (rows % HEADS) * q_head
    return tl.trans(tl.load(q_at[:, None] + d[None], mask=real[:, None], other=0.0)), position, real


@triton.jit
def page_scores(k_pages, page, block, q, position, BLOCK: tl.constexpr, D: tl.constexpr, DOT: tl.constexpr):
    """[BLOCK, ROWS] scores of one page's keys, -inf where a row does not see one. Equal keys give equal bits."""
    k = to_dot(k_pages.load([page, 0, 0]).reshape([BLOCK, D]), DOT)
    key = block * BLOCK + tl.arange(0, BLOCK)
    return tl.where(key[:, None] <= position[None], tl.dot(k, q), -INF)


@triton.jit
def _units(q):
    """[D, ROWS] -> float32 [ROWS]: the power of two in each row's largest number, 1 for zeros."""
    unit = (tl.max(tl.abs(q.to(tl.float32)), 0).to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True)
    return tl.where(unit > 0.0, unit, 1.0)


@triton.jit(do_not_specialize=["table_row", "width"])
def score_step(
    q_ptr, k_pages, k_scale_ptr, k_error_ptr, scores_ptr, cu_q_ptr, positions_ptr, table_ptr, q_token, q_head,
    table_row, scale_page, width, k_mul, EACH: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr, SCALED: tl.constexpr, NARROW: tl.constexpr,
    BOUNDS: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One of the equal shares, of at most SPAN, of a sequence's blocks against all its rows: (query, index head).

    A block's best score; with BOUNDS what the best can be at most, given the page's error, as an integer of the same
    order whose low bits are the best key's place. A scale is positive: it may wait until one score a block is left.
    NARROW keys, fp8, become float16, a third of the work of bfloat16; so queries do, in units of a power of two a row.
    """
    enter(PDL)
    seq = tl.program_id(1)
    q, position, real = index_rows(q_ptr, cu_q_ptr, positions_ptr, seq, q_token, q_head, EACH, HEADS, ROWS, D)
    if NARROW:
        unit = _units(q)
        q = q.to(tl.float32) / unit[None]
        length = unit * tl.sqrt(tl.sum(q * q, 0))
        unit *= k_mul
    q = q.to(DOT)
    blocks = (tl.max(position, 0) + BLOCK) // BLOCK
    share = tl.cdiv(blocks, tl.num_programs(0))
    begin = tl.program_id(0) * share
    end = tl.minimum(begin + share, blocks)
    out = scores_ptr + (seq * ROWS + tl.arange(0, ROWS)).to(tl.int64) * width
    nearby = begin + tl.arange(0, SPAN)
    pages = tl.load(table_ptr + seq.to(tl.int64) * table_row + nearby, mask=nearby < end, other=0)
    if SCALED:
        scales = tl.load(k_scale_ptr + pages.to(tl.int64) * scale_page)
    if BOUNDS:
        errors = tl.load(k_error_ptr + pages)
    for block in tl.range(begin, end, num_stages=STAGES):
        n = block - begin
        scores = page_scores(k_pages, nth(pages, n, SPAN), block, q, position, BLOCK, D, DOT)
        if BOUNDS:
            order = in_order(scores.to(tl.int32, bitcast=True))
            order = tl.max((order & -BLOCK) | tl.arange(0, BLOCK)[:, None], 0)
            best = in_order(order & -BLOCK).to(tl.float32, bitcast=True)
        else:
            best = tl.max(scores, 0)
        if NARROW:
            best *= unit
        if SCALED:
            best *= nth(scales, n, SPAN)
        if BOUNDS:
            best += length * nth(errors, n, SPAN) + TINY
            best = tl.where(best < LARGEST, best, LARGEST)  # an infinite bound, or none that is a number
            best = (in_order(best.to(tl.int32, bitcast=True)) & -BLOCK) | (order & (BLOCK - 1))
        tl.store(out + block, best, mask=real)


@triton.jit(do_not_specialize=["table_row", "tokens"])
def attend_step(
    q_ptr, k_pages, v_pages, blocks_ptr, out_ptr, lse_ptr, k_scale_ptr, v_scale_ptr, cu_q_ptr, seq_ids_ptr,
    positions_ptr, table_ptr, q_token, q_head, table_row, k_scale_page, k_scale_head, v_scale_page, v_scale_head,
    tokens, heads, score_mul, v_mul, EACH: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr,
    SHARE: tl.constexpr, TOPK: tl.constexpr, SELECTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BN: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr, K_SCALED: tl.constexpr, V_SCALED: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One part, of at most SPAN steps of BN keys, of what one KV head attends to: one token's selected blocks, or all
    blocks of a sequence for its few tokens. SHARE KV heads share one selection. Stores the part's output and lse."""
    enter(PDL)
    unit = tl.program_id(0) // KV_HEADS
    r = tl.program_id(0) % KV_HEADS
    part = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, ROWS)
    if SELECTED:
        seq = tl.load(seq_ids_ptr + unit).to(tl.int64)
        token = unit + rows * 0
        real = rows < GROUP
    else:
        seq = unit.to(tl.int64)
        first, count = queries_of(cu_q_ptr, unit, EACH)
        token = first + rows // GROUP
        real = rows < count * GROUP
    position = tl.load(positions_ptr + token, mask=real, other=-1).to(tl.int32)
    if SELECTED:
        steps = TOPK * BLOCK // BN
        chosen = blocks_ptr + (r // SHARE * tokens + unit).to(tl.int64) * TOPK
    else:
        steps = (tl.max(position, 0) + BN) // BN
        chosen = blocks_ptr
    share = tl.cdiv(steps, tl.num_programs(1))
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, steps)
    d = tl.arange(0, D)
    head = r * GROUP + rows % GROUP
    q_at = q_ptr + token.to(tl.int64) * q_token + head * q_head
    q = tl.trans(tl.load(q_at[:, None] + d[None], mask=real[:, None], other=0.0).to(DOT))
    table = table_ptr + seq * table_row
    PER: tl.constexpr = BLOCK // BN
    nearby = begin + tl.arange(0, SPAN)
    listed = nearby // PER
    if SELECTED:
        listed = tl.load(chosen + nearby // PER, mask=nearby < end, other=-1)
    pages = tl.load(table + tl.maximum(listed, 0), mask=nearby < end, other=0)
    lane = tl.arange(0, BN)
    acc = tl.zeros([D, ROWS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], -INF, tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        block = step // PER
        if SELECTED:
            block = nth(listed, step - begin, SPAN)
        inside = step % PER * BN
        page = nth(pages, step - begin, SPAN)
        k = to_dot(k_pages.load([page, r, inside, 0]).reshape([BN, D]), DOT)
        scores = tl.dot(k, q) * score_mul  # [BN, ROWS]
        if K_SCALED:
            scores *= tl.load(k_scale_ptr + page.to(tl.int64) * k_scale_page + r * k_scale_head)
        # Where no block is, no key is before any position.
        key = tl.where(block >= 0, block * BLOCK + inside, 2**31 - 1 - BN) + lane
        scores = tl.where(key[:, None] <= position[None], scores, -INF)
        best = tl.maximum(top, tl.max(scores, 0))
        safe = tl.where(best == -INF, 0.0, best)
        p = tl.exp2(scores - safe[None])
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(p, 0)
        if V_SCALED:
            p *= tl.load(v_scale_ptr + page.to(tl.int64) * v_scale_page + r * v_scale_head)
        v = to_dot(v_pages.load([page, r, inside, 0]).reshape([BN, D]), DOT)
        acc = tl.dot(tl.trans(v), p.to(DOT), acc * fade[None])
        top = best
    some = total > 0.0
    whole = tl.where(some, total, 1.0)
    at = (part * tokens + token) * heads + head
    out = acc * (v_mul / whole)[None]
    tl.store(out_ptr + at[None] * D + d[:, None], out.to(out_ptr.dtype.element_ty), mask=real[None])
    tl.store(lse_ptr + at, tl.where(some, (top + tl.log2(whole)) * LN2, -INF), mask=real)


@triton.jit(do_not_specialize=["rows", "parts"])
def combine_step(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, rows, parts, PARTS_PAD: tl.constexpr, PIECE: tl.constexpr,
    D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row of the parts [parts, rows, D], lse [parts, rows] -> out [rows, D], lse [rows]; PIECE parts at a time."""
    enter(PDL)
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS_PAD)
    lse = tl.load(part_lse_ptr + part.to(tl.int64) * rows + row, mask=part < parts, other=-INF)
    top = tl.max(lse, 0)
    safe = tl.where(top == -INF, 0.0, top)
    total = tl.sum(tl.exp(lse - safe), 0)
    whole = tl.where(total > 0.0, total, 1.0)
    d = tl.arange(0, D)
    out = tl.zeros([D], tl.float32)
    for first in range(0, PARTS_PAD, PIECE):
        piece = first + tl.arange(0, PIECE)
        at = piece.to(tl.int64) * rows + row
        weight = tl.exp(tl.load(part_lse_ptr + at, mask=piece < parts, other=-INF) - safe)
        x = tl.load(part_ptr + at[:, None] * D + d[None], mask=(piece < parts)[:, None], other=0.0)
        out += tl.sum(x * weight[:, None], 0)
    tl.store(out_ptr + row * D + d, (out / whole).to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr + row, tl.where(total > 0.0, safe + tl.log(whole), -INF))
