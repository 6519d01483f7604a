"""Attention in Triton: over the selected blocks of each query, and over all visible keys; then the parts of a split.

The query heads that share a KV head, of a few neighbouring queries, are the rows of one product. `attend_selected`
walks the union of its queries' blocks: neighbours agree on most, and a row's mask takes out what it did not select.
Where there are too few programs for the device, each walks one part of its keys only, and `combine` joins the parts by
their log-sum-exp. Scores carry log2(e), so that exponentials are powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from openm3.msa.triton_select import to_dot

INF = tl.constexpr(float("inf"))
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate(table, start, block, inside, key, wanted, page_stride, token_stride, PAGED: tl.constexpr):
    """Keys' offsets within one head (int64), and their pages. `table`: the sequence's row of the page table."""
    if PAGED:
        page = tl.load(table + block, mask=wanted, other=0).to(tl.int64)
        return page * page_stride + inside * token_stride, page
    else:
        return (start + key) * token_stride, start


@triton.jit
def load_keys(ptr, offset, d, usable, D: tl.constexpr, D_PAD: tl.constexpr, MASKED: tl.constexpr, DOT: tl.constexpr):
    """[BN, D_PAD] of keys or values, zeros where they are not usable."""
    at = ptr + offset[:, None] + d[None]
    if MASKED:
        x = tl.load(at, mask=usable[:, None] & (d < D)[None], other=0.0)
    elif D == D_PAD:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(d < D)[None], other=0.0)
    return to_dot(x, DOT)


@triton.jit
def absorb(acc, total, top, scores, v, v_factor, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the running softmax: scores [BM, BN] (base 2), v [BN, D_PAD], v_factor a number or [1, BN]."""
    best = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(best == -INF, 0.0, best)
    p = tl.exp2(scores - safe[:, None])
    fade = tl.exp2(top - safe)
    total = total * fade + tl.sum(p, 1)
    acc = tl.dot((p * v_factor).to(DOT), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, total, best


@triton.jit
def finish(acc, total, top, v_mul, out_ptr, lse_ptr, at, d, real, D: tl.constexpr):
    """Stores [BM, D] at rows `at` of a [rows, D] tensor, and the log-sum-exp; zeros and -inf where nothing was seen."""
    some = total > 0.0
    out = acc * (v_mul / tl.where(some, total, 1.0))[:, None]
    tl.store(out_ptr + at[:, None] * D + d[None], out.to(out_ptr.dtype.element_ty), mask=real[:, None] & (d < D)[None])
    lse = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * LN2, -INF)
    tl.store(lse_ptr + at, lse, mask=real)


@triton.jit
def _either(block, bits, next_block, next_bits):
    return next_block, tl.where(block == next_block, bits | next_bits, next_bits)


@triton.jit(do_not_specialize=["tokens", "tile_start"])
def unite_blocks(
    blocks_ptr, list_ptr, length_ptr, first_ptr, count_ptr, tokens, tile_start,
    QUERIES: tl.constexpr, TOPK: tl.constexpr, TOPK_PAD: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """What the at most 8 queries of a tile selected, for one index head: each block once, ascending, with who selected
    it. An entry is block * 256 + a bit a query. With a LIMIT, the length of a longer union is -1.

    All selected blocks are sorted, which one warp does in its registers; then each entry learns who else stands before
    and behind it for the same block, and the last one knows of all.
    """
    tile = tl.program_id(0) + tile_start
    head = tl.program_id(1)
    WIDTH: tl.constexpr = QUERIES * TOPK_PAD
    NONE: tl.constexpr = 2**31 - 1
    lane = tl.arange(0, WIDTH)
    query = lane // TOPK_PAD
    token = tl.load(first_ptr + tile).to(tl.int64) + query
    filled = (query < tl.load(count_ptr + tile)) & (lane % TOPK_PAD < TOPK)
    at = (head.to(tl.int64) * tokens + token) * TOPK + lane % TOPK_PAD
    block = tl.load(blocks_ptr + at, mask=filled, other=-1)
    key = tl.sort(tl.where(block >= 0, block * 8 + query, NONE))
    block = key >> 3
    mine = 1 << (key & 7)
    _, before = tl.associative_scan((block, mine), 0, _either)
    _, behind = tl.associative_scan((block, mine), 0, _either, reverse=True)
    bits = before | behind
    last = (before == bits) & (key != NONE)
    rank = tl.cumsum(last.to(tl.int32), 0) - 1
    row = tl.program_id(0) * tl.num_programs(1) + head
    tl.store(list_ptr + row * WIDTH + rank, block * 256 + bits, mask=last)
    length = tl.sum(last.to(tl.int32), 0)
    if LIMIT > 0:
        length = tl.where(length <= LIMIT, length, -1)
    tl.store(length_ptr + row, length)


@triton.jit
def listed(
    list_ptr, length_ptr, first, r, tokens, QUERIES: tl.constexpr, SHARE: tl.constexpr, TOPK: tl.constexpr,
    TOPK_PAD: tl.constexpr,
):  # fmt: skip
    """This program's list and its length: that of `unite_blocks`, or for a single query its row of the selection."""
    if QUERIES == 1:
        chosen = list_ptr + (r // SHARE * tokens + first) * TOPK
        slots = tl.arange(0, TOPK_PAD)
        filled = tl.load(chosen + slots, mask=slots < TOPK, other=-1) >= 0
        length = tl.max(tl.where(filled, slots + 1, 0), 0)
    else:
        row = tl.program_id(0) * (tl.num_programs(1) // SHARE) + r // SHARE
        chosen = list_ptr + row * (QUERIES * TOPK_PAD)
        length = tl.load(length_ptr + row)
    return chosen, length


@triton.jit
def entries(chosen, n, end, lane, query, BLOCK: tl.constexpr, BN: tl.constexpr, QUERIES: tl.constexpr):
    """The blocks of a step from key n of a list, the keys' places in them, and which rows selected them [BM, BN]."""
    if BLOCK % BN == 0:
        entry = tl.load(chosen + n // BLOCK)
        inside = n % BLOCK + lane
        members = ((entry >> query) & 1 > 0)[:, None]
    else:  # a step goes across blocks
        entry = tl.load(chosen + (n + lane) // BLOCK, mask=n + lane < end, other=-1)
        inside = (n + lane) % BLOCK
        members = (entry[None] >> query[:, None]) & 1 > 0
    if QUERIES == 1:
        return entry, inside, (query >= 0)[:, None]
    else:
        return entry >> 8, inside, members


@triton.jit(do_not_specialize=["table_row", "tokens", "tile_start"])
def attend_selected(
    q_ptr, k_ptr, v_ptr, list_ptr, length_ptr, out_ptr, lse_ptr, k_scale_ptr, v_scale_ptr, tile_seq_ptr, first_ptr,
    count_ptr, positions_ptr, cu_k_ptr, table_ptr, q_token, q_head, k_page, k_head, k_token, v_page, v_head, v_token,
    table_row, k_scale_page, k_scale_head, v_scale_page, v_scale_head, tokens, heads, score_mul, v_mul, tile_start,
    GROUP: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
    TOPK: tl.constexpr, TOPK_PAD: tl.constexpr, QUERIES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PAGED: tl.constexpr, K_SCALED: tl.constexpr, V_SCALED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries and one KV head against the keys of their blocks, one block behind the other, or one part of
    these. SHARE KV heads share one selection."""
    tile = tl.program_id(0) + tile_start
    r = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    seq = tl.load(tile_seq_ptr + tile).to(tl.int64)
    rows = tl.arange(0, BM)
    query = rows // GROUP
    real = rows < tl.load(count_ptr + tile) * GROUP
    first = tl.load(first_ptr + tile).to(tl.int64)
    head = r * GROUP + rows % GROUP
    position = tl.load(positions_ptr + first + query, mask=real, other=-1).to(tl.int32)
    last = tl.max(position, 0)
    d = tl.arange(0, D_PAD)
    q_at = q_ptr + (first + query) * q_token + head * q_head
    q = tl.load(q_at[:, None] + d[None], mask=real[:, None] & (d < D)[None], other=0.0).to(DOT)
    chosen, length = listed(list_ptr, length_ptr, first, r, tokens, QUERIES, SHARE, TOPK, TOPK_PAD)
    span = tl.cdiv(length * BLOCK, BN * tl.num_programs(2)) * BN
    end = tl.minimum(length * BLOCK, (part + 1) * span)
    table = table_ptr + seq * table_row
    start = tl.load(cu_k_ptr + seq).to(tl.int64)
    lane = tl.arange(0, BN)
    acc = tl.zeros([BM, D_PAD], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], -INF, tl.float32)
    for n in range(part * span, end, BN):
        block, inside, members = entries(chosen, n, end, lane, query, BLOCK, BN, QUERIES)
        key = block * BLOCK + inside
        usable = (key >= 0) & (key <= last)
        k_at, page = locate(table, start, block, inside, key, block >= 0, k_page, k_token, PAGED)
        v_at, page = locate(table, start, block, inside, key, block >= 0, v_page, v_token, PAGED)
        k = load_keys(k_ptr + r * k_head, k_at, d, usable, D, D_PAD, True, DOT)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score_mul
        if K_SCALED:
            k_factor = tl.load(k_scale_ptr + page * k_scale_page + r * k_scale_head)
            scores *= k_factor if BLOCK % BN == 0 else k_factor[None]
        visible = members & usable[None] & (key[None] <= position[:, None])
        scores = tl.where(visible, scores, -INF)
        v_factor = 1.0
        if V_SCALED:
            v_factor = tl.load(v_scale_ptr + page * v_scale_page + r * v_scale_head)
            if BLOCK % BN != 0:
                v_factor = v_factor[None]
        v = load_keys(v_ptr + r * v_head, v_at, d, usable, D, D_PAD, True, DOT)
        acc, total, top = absorb(acc, total, top, scores, v, v_factor, DOT, PRECISION)
    at = (part * tokens + first + query) * heads + head
    finish(acc, total, top, v_mul, out_ptr, lse_ptr, at, d, real, D)


@triton.jit(do_not_specialize=["table_row", "tokens", "span"])
def attend_all(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, k_scale_ptr, v_scale_ptr, tile_seq_ptr, first_ptr, count_ptr,
    positions_ptr, cu_k_ptr, table_ptr, q_token, q_head, k_page, k_head, k_token, v_page, v_head, v_token, table_row,
    k_scale_page, k_scale_head, v_scale_page, v_scale_head, tokens, heads, score_mul, v_mul, span,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PAGED: tl.constexpr, K_SCALED: tl.constexpr, V_SCALED: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries and one KV head against the keys part * span .. (part + 1) * span of their sequence."""
    tile = tl.program_id(0)
    r = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    seq = tl.load(tile_seq_ptr + tile).to(tl.int64)
    rows = tl.arange(0, BM)
    real = rows < tl.load(count_ptr + tile) * GROUP
    token = tl.load(first_ptr + tile).to(tl.int64) + rows // GROUP
    head = r * GROUP + rows % GROUP
    position = tl.load(positions_ptr + token, mask=real, other=-1).to(tl.int32)
    d = tl.arange(0, D_PAD)
    q_at = q_ptr + token * q_token + head * q_head
    q = tl.load(q_at[:, None] + d[None], mask=real[:, None] & (d < D)[None], other=0.0).to(DOT)
    lowest = tl.min(tl.where(real, position, 2**31 - 1), 0)
    last = tl.max(position, 0)
    begin = part * span
    end = tl.minimum(last + 1, begin + span)
    whole = tl.minimum(end, tl.maximum(lowest + 1, begin) // BN * BN)  # before it every row sees every key
    table = table_ptr + seq * table_row
    start = tl.load(cu_k_ptr + seq).to(tl.int64)
    acc = tl.zeros([BM, D_PAD], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], -INF, tl.float32)
    acc, total, top = _walk(
        acc, total, top, q, position, last, begin, whole, k_ptr + r * k_head, v_ptr + r * v_head,
        k_scale_ptr + r * k_scale_head, v_scale_ptr + r * v_scale_head, table, start, k_page, k_token, v_page,
        v_token, k_scale_page, v_scale_page, score_mul, D, D_PAD, BLOCK, BN, PAGED, K_SCALED, V_SCALED, DOT,
        PRECISION, False,
    )  # fmt: skip
    acc, total, top = _walk(
        acc, total, top, q, position, last, tl.maximum(begin, whole), end, k_ptr + r * k_head, v_ptr + r * v_head,
        k_scale_ptr + r * k_scale_head, v_scale_ptr + r * v_scale_head, table, start, k_page, k_token, v_page,
        v_token, k_scale_page, v_scale_page, score_mul, D, D_PAD, BLOCK, BN, PAGED, K_SCALED, V_SCALED, DOT,
        PRECISION, True,
    )  # fmt: skip
    at = (part * tokens + token) * heads + head
    finish(acc, total, top, v_mul, out_ptr, lse_ptr, at, d, real, D)


@triton.jit
def _walk(
    acc, total, top, q, position, last, begin, end, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table, start, k_page,
    k_token, v_page, v_token, k_scale_page, v_scale_page, score_mul, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK: tl.constexpr, BN: tl.constexpr, PAGED: tl.constexpr, K_SCALED: tl.constexpr, V_SCALED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BN)
    d = tl.arange(0, D_PAD)
    for n in range(begin, end, BN):
        key = n + lane
        if BLOCK % BN == 0:
            block = n // BLOCK
            wanted = n <= last
        else:
            block = key // BLOCK
            wanted = key <= last
        k_at, page = locate(table, start, block, key % BLOCK, key, wanted, k_page, k_token, PAGED)
        v_at, page = locate(table, start, block, key % BLOCK, key, wanted, v_page, v_token, PAGED)
        k = load_keys(k_ptr, k_at, d, key <= last, D, D_PAD, MASKED, DOT)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score_mul
        if K_SCALED:
            k_factor = tl.load(k_scale_ptr + page * k_scale_page)
            scores *= k_factor if BLOCK % BN == 0 else k_factor[None]
        if MASKED:
            scores = tl.where(key[None] <= position[:, None], scores, -INF)
        v_factor = 1.0
        if V_SCALED:
            v_factor = tl.load(v_scale_ptr + page * v_scale_page)
            if BLOCK % BN != 0:
                v_factor = v_factor[None]
        v = load_keys(v_ptr, v_at, d, key <= last, D, D_PAD, MASKED, DOT)
        acc, total, top = absorb(acc, total, top, scores, v, v_factor, DOT, PRECISION)
    return acc, total, top


@triton.jit(do_not_specialize=["rows", "parts"])
def combine(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, rows, parts,
    PARTS_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """One row of partial attentions [parts, rows, D], lse [parts, rows] -> out [rows, D], lse [rows]."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS_PAD)
    d = tl.arange(0, D_PAD)
    real = part < parts
    at = part * rows + row
    lse = tl.load(part_lse_ptr + at, mask=real, other=-INF)
    top = tl.max(lse, 0)
    safe = tl.where(top == -INF, 0.0, top)
    weight = tl.exp(lse - safe)
    total = tl.sum(weight, 0)
    some = total > 0.0
    x = tl.load(part_ptr + at[:, None] * D + d[None], mask=real[:, None] & (d < D)[None], other=0.0)
    out = tl.sum(x * weight[:, None], 0) / tl.where(some, total, 1.0)
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)
    tl.store(lse_ptr + row, tl.where(some, safe + tl.log(tl.where(some, total, 1.0)), -INF))
