"""Selection in Triton: each block's best score by one product with a maximum behind it, then the k best of each row.

A row is one (query, index head): all index heads share one key, so a tile of rows is one operand of one product. Rows
stand in tiles of a sequence (`Tiles` of triton_backend.py); a tile's scores lie in the workspace as [rows, blocks].
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))  # below the rank of any score
HIGHEST = tl.constexpr(2**31 - 1)
FORCED = tl.constexpr(2**31 - 2)
INF = tl.constexpr(float("inf"))


@triton.jit
def to_dot(x, DOT: tl.constexpr):
    """To the dtype of a product, exactly; fp8 to bf16 by way of float32, because sm_89 has no other."""
    if x.dtype == tl.float8e4nv and tl.bfloat16 == DOT:
        x = x.to(tl.float32)
    return x.to(DOT)


@triton.jit(do_not_specialize=["table_row", "tile_start"])
def score_blocks(
    q_ptr, k_ptr, k_scale_ptr, scores_ptr, seq_ptr, first_ptr, count_ptr, base_ptr, width_ptr,
    positions_ptr, cu_k_ptr, table_ptr, q_token, q_head, k_page, k_token, table_row, scale_page, tile_start,
    HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PER: tl.constexpr, PAGED: tl.constexpr, SCALED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BM rows against PER blocks, BN keys a step. A block is cut into steps, or several fill one."""
    tile = tl.program_id(0) + tile_start
    block0 = tl.program_id(1) * PER
    seq = tl.load(seq_ptr + tile).to(tl.int64)
    first = tl.load(first_ptr + tile).to(tl.int64)
    rows = tl.arange(0, BM)
    real = rows < tl.load(count_ptr + tile) * HEADS
    token = first + rows // HEADS
    position = tl.load(positions_ptr + token, mask=real, other=-1).to(tl.int32)
    last = tl.max(position, 0)
    if block0 * BLOCK > last:
        return
    d = tl.arange(0, D_PAD)
    q_at = q_ptr + token * q_token + (rows % HEADS) * q_head
    q = tl.load(q_at[:, None] + d[None], mask=real[:, None] & (d < D)[None], other=0.0).to(DOT)
    width = tl.load(width_ptr + tile)
    out = scores_ptr + tl.load(base_ptr + tile) + rows.to(tl.int64) * width
    start = tl.load(cu_k_ptr + seq).to(tl.int64)
    found = tl.full([BM, PER], -INF, tl.float32)
    STEPS: tl.constexpr = PER * BLOCK_PAD // BN
    whole, end = 0, STEPS
    if (
        BLOCK == BLOCK_PAD
    ):  # the first steps' keys are seen by all rows (padding rows are not asked), the last's by none
        lowest = tl.min(tl.where(real, position, HIGHEST), 0)
        whole = tl.maximum(tl.minimum((lowest + 1) // BN - block0 * BLOCK // BN, STEPS), 0)
        end = tl.minimum(last // BN + 1 - block0 * BLOCK // BN, STEPS)
    found = _maxima(
        found, 0, whole, q, k_ptr, k_scale_ptr, table_ptr, out, seq, start, position, last, real, width, block0,
        k_page, k_token, table_row, scale_page, D, D_PAD, BLOCK, BLOCK_PAD, BM, BN, PER, PAGED, SCALED, DOT, PRECISION,
        False,
    )  # fmt: skip
    found = _maxima(
        found, whole, end, q, k_ptr, k_scale_ptr, table_ptr, out, seq, start, position, last, real, width, block0,
        k_page, k_token, table_row, scale_page, D, D_PAD, BLOCK, BLOCK_PAD, BM, BN, PER, PAGED, SCALED, DOT, PRECISION,
        True,
    )  # fmt: skip
    if BLOCK_PAD >= BN:
        columns = block0 + tl.arange(0, PER)
        tl.store(out[:, None] + columns[None], found, mask=real[:, None] & (columns < width)[None])


@triton.jit
def _maxima(
    found, begin, end, q, k_ptr, k_scale_ptr, table_ptr, out, seq, start, position, last, real, width, block0, k_page,
    k_token, table_row, scale_page, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PER: tl.constexpr, PAGED: tl.constexpr, SCALED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Steps begin .. end: blocks' maxima go into `found` [BM, PER], or where a step holds several, to memory."""
    d = tl.arange(0, D_PAD)
    lane = tl.arange(0, BN)
    column = tl.arange(0, PER)
    for step in range(begin, end):
        flat = step * BN
        if BLOCK_PAD >= BN:
            block = block0 + flat // BLOCK_PAD  # one block, or a part of one
            inside = flat % BLOCK_PAD + lane
        else:
            block = block0 + (flat + lane) // BLOCK_PAD
            inside = lane % BLOCK_PAD
        key = block * BLOCK + inside
        if PAGED:
            page = tl.load(table_ptr + seq * table_row + block, mask=block * BLOCK <= last, other=0).to(tl.int64)
            k_at = page * k_page + inside * k_token
        else:
            k_at = (start + key) * k_token
        usable = (inside < BLOCK) & (key <= last)
        if MASKED:
            k = tl.load(k_ptr + k_at[None] + d[:, None], mask=usable[None] & (d < D)[:, None], other=0.0)
        elif D == D_PAD:
            k = tl.load(k_ptr + k_at[None] + d[:, None])
        else:
            k = tl.load(k_ptr + k_at[None] + d[:, None], mask=(d < D)[:, None], other=0.0)
        scores = tl.dot(q, to_dot(k, DOT), input_precision=PRECISION)
        if MASKED:
            scores = tl.where((key[None] <= position[:, None]) & (inside < BLOCK)[None], scores, -INF)
        if BLOCK_PAD >= BN:
            best = tl.max(scores, 1)
            if SCALED:  # a scale is positive: it may wait until one score a block is left
                best *= tl.load(k_scale_ptr + page * scale_page)
            found = tl.where((column == flat // BLOCK_PAD)[None], tl.maximum(found, best[:, None]), found)
        else:
            if SCALED:
                scores *= tl.load(k_scale_ptr + page * scale_page)[None]
            bests = tl.max(tl.reshape(scores, [BM, BN // BLOCK_PAD, BLOCK_PAD]), 2)
            columns = block0 + flat // BLOCK_PAD + tl.arange(0, BN // BLOCK_PAD)
            tl.store(out[:, None] + columns[None], bests, mask=real[:, None] & (columns < width)[None])
    return found


@triton.jit
def in_order(bits):
    """A float32's bits as an integer of the same order, and back."""
    return bits ^ ((bits >> 31) & HIGHEST)


@triton.jit
def _ranks(row, ids, seen, LOCAL: tl.constexpr, INIT: tl.constexpr):
    """Scores as integers of the same order; forced blocks above all, what is not seen below all."""
    score = tl.load(row + ids, mask=ids < seen, other=0.0)
    score = tl.where(score == 0.0, 0.0, score)  # the two zeros tie
    rank = in_order(score.to(tl.int32, bitcast=True))
    rank = tl.where((ids < INIT) | (ids >= seen - LOCAL), FORCED, rank)
    return tl.where(ids < seen, rank, LOWEST)


@triton.jit(do_not_specialize=["tokens", "tile_start", "tile_rows"])
def pick_blocks(
    scores_ptr, blocks_ptr, values_ptr, first_ptr, count_ptr, base_ptr, width_ptr, positions_ptr, tokens, tile_start,
    tile_rows, HEADS: tl.constexpr, BLOCK: tl.constexpr, TOPK: tl.constexpr, TOPK_PAD: tl.constexpr,
    LOCAL: tl.constexpr, INIT: tl.constexpr, CHUNK: tl.constexpr, LONG: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """One row: the TOPK best blocks, ascending; ties to the lower one. Rows longer than CHUNK are read again a step.

    The rank of the last block to be taken is found by bisection over the ranks' 32 bits: count what is at least as
    good, halve, stop early once exactly TOPK are. A prefix sum then gives each taken block its slot.
    """
    tile = tl.program_id(0) // tile_rows + tile_start
    r = tl.program_id(0) % tile_rows
    if r >= tl.load(count_ptr + tile) * HEADS:
        return
    token = tl.load(first_ptr + tile).to(tl.int64) + r // HEADS
    position = tl.load(positions_ptr + token).to(tl.int32)
    seen = tl.where(position >= 0, position // BLOCK + 1, 0)
    row = scores_ptr + tl.load(base_ptr + tile) + r.to(tl.int64) * tl.load(width_ptr + tile)
    lane = tl.arange(0, CHUNK)
    rank = _ranks(row, lane, seen, LOCAL, INIT)

    low = tl.full([], LOWEST, tl.int32)  # at least TOPK blocks rank as high as `low`, fewer as high as `high`
    if seen > TOPK:
        high = tl.full([], HIGHEST, tl.int32)
        middle = tl.full([], -1, tl.int32)
        while middle != low:
            count = tl.sum((rank >= middle).to(tl.int32), 0)
            if LONG:
                for a in range(CHUNK, seen, CHUNK):
                    count += tl.sum((_ranks(row, a + lane, seen, LOCAL, INIT) >= middle).to(tl.int32), 0)
            enough = count >= TOPK
            low = tl.where(enough, middle, low)
            high = tl.where(count > TOPK, high, middle)
            middle = (low & high) + ((low ^ high) >> 1)

    above = tl.sum((rank > low).to(tl.int32), 0)
    if LONG:
        for a in range(CHUNK, seen, CHUNK):
            above += tl.sum((_ranks(row, a + lane, seen, LOCAL, INIT) > low).to(tl.int32), 0)
    room = TOPK - above
    at = (r % HEADS).to(tl.int64) * tokens * TOPK + token * TOPK
    slots = tl.arange(0, TOPK_PAD)
    none = (slots >= tl.minimum(seen, TOPK)) & (slots < TOPK)
    tl.store(blocks_ptr + at + slots, tl.full([TOPK_PAD], -1, tl.int32), mask=none)
    if VALUES:
        tl.store(values_ptr + at + slots, tl.full([TOPK_PAD], -INF, tl.float32), mask=none)
    counted = _place(row, rank, lane, seen, low, room, 0, blocks_ptr + at, values_ptr + at, VALUES)
    if LONG:
        for a in range(CHUNK, seen, CHUNK):
            rank = _ranks(row, a + lane, seen, LOCAL, INIT)
            counted = _place(row, rank, a + lane, seen, low, room, counted, blocks_ptr + at, values_ptr + at, VALUES)


@triton.jit
def _before(one):
    """Sums of what stands before each entry of a row. Long ones by parts: one scan over all has each thread of many
    warps add up what all the others' parts have. Parts of 128 are one warp's own, which is the least where there is
    one warp, as for rows that long; parts of 8 are one thread's own."""
    LENGTH: tl.constexpr = one.shape[0]
    if LENGTH <= 256:
        return tl.cumsum(one, 0) - one
    elif LENGTH <= 1024:
        part = tl.arange(0, LENGTH // 128)
        cut = tl.reshape(one, [LENGTH // 128, 128])
        total = tl.sum(cut, 1)
        earlier = tl.sum(tl.where(part[None] < part[:, None], total[None], 0), 1)
        return tl.reshape(tl.cumsum(cut, 1) - cut + earlier[:, None], [LENGTH])
    else:
        cut = tl.reshape(one, [LENGTH // 8, 8])
        total = tl.sum(cut, 1)
        earlier = tl.cumsum(total, 0) - total
        return tl.reshape(tl.cumsum(cut, 1) - cut + earlier[:, None], [LENGTH])


@triton.jit
def _place(row, rank, ids, seen, low, room, counted, blocks_ptr, values_ptr, VALUES: tl.constexpr):
    """Stores the taken blocks of one chunk. Returns `counted` after it: better blocks + 256 * those that tie."""
    better = rank > low
    tie = (rank == low) & (ids < seen)
    one = better.to(tl.int32) + tie.to(tl.int32) * 256  # fewer than 256 are better: both counts in one prefix sum
    before = _before(one) + counted
    ties = before >> 8
    taken = better | (tie & (ties < room))
    slot = (before & 255) + tl.minimum(ties, room)
    tl.store(blocks_ptr + slot, ids, mask=taken)
    if VALUES:
        tl.store(values_ptr + slot, tl.load(row + ids, mask=taken, other=0.0), mask=taken)
    return counted + tl.sum(one, 0)
