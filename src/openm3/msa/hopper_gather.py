"""Sparse attention of a prompt where neighbouring queries do not agree: keys outside, queries gathered.

Whoever selected one page stands together (`by_page`), in chunks of at most CHUNK queries. A program keeps the page's
keys and values and lets its queries pass, QUERIES at a time with all heads of a group, so that a page is read once in a
chunk and no product works on rows that did not ask for it. Each pass leaves one partial output a (query, head, slot);
joining them is a second kernel. The order of all follows from a stable sort: the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openm3.msa.hopper_decode import EXPONENT
from openm3.msa.triton_select import to_dot

INF = tl.constexpr(float("inf"))
LN2 = tl.constexpr(0.6931471805599453)
PASSING = tl.constexpr("evict_first")  # parts are more than the L2 holds, and would drive the queries out of it


def by_page(pages: Tensor, pool: int, chunk: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """int32 [Hi, E] pages below `pool`, or `pool` for none -> in order, whence each came int64 [Hi, E], chunks.

    A chunk is at most `chunk` entries of one page; where each begins is int32 [Hi, `most` + 1], E behind the last one.
    """
    heads, entries = pages.shape
    # One long row: each head's pages in a range of their own.
    range_of = torch.arange(heads, dtype=torch.int32, device=pages.device)[:, None] * (pool + 1)
    keys, order = (pages + range_of).flatten().sort(stable=True)
    nth = torch.arange(len(keys), dtype=torch.int32, device=pages.device)
    since = nth - torch.searchsorted(keys, keys, out_int32=True)  # the first of the page
    keys = keys.view(heads, entries) - range_of
    begins = (since % chunk == 0).view(heads, entries) & (keys != pool)
    counted = begins.flatten().cumsum(0, dtype=torch.int32).view(heads, entries)
    slot = counted - counted[:, :1] + begins[:, :1].int() - 1
    starts = torch.full((heads, most + 1), entries, dtype=torch.int32, device=pages.device)
    nth = nth[:entries].expand(heads, entries)
    starts.scatter_(1, torch.where(begins, slot, most).long(), torch.where(begins, nth, entries))
    order = order.view(heads, entries) - torch.arange(heads, device=order.device)[:, None] * entries
    return keys, order, starts


@triton.jit
def of_row(values, nth, at):
    """values[at] of a short row, `at` a column."""
    return tl.sum(tl.where(nth[None] == at[:, None], values[None], 0), 1)


@triton.jit(do_not_specialize=["entries", "chunks", "lo", "tokens", "head0"])
def attend_gathered(
    q_ptr, k_pages, v_pages, k_scale_ptr, v_scale_ptr, keys_ptr, order_ptr, starts_ptr, blocks_ptr, part_ptr,
    unit_ptr, part_lse_ptr, positions_ptr, q_token, q_head, k_scale_page, k_scale_head, v_scale_page, v_scale_head,
    entries, chunks, lo, tokens, head0, score_mul, v_mul, GROUP: tl.constexpr, SHARE: tl.constexpr, TOPK: tl.constexpr,
    QUERIES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, K_SCALED: tl.constexpr,
    V_SCALED: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One chunk of queries and one KV head. Parts of queries lo .. lie as [query, head of the group, slot, D], float16
    in units of a power of two a row: bfloat16 would round the result twice."""
    r = head0 + tl.program_id(1)
    row = (r // SHARE).to(tl.int64)
    start = tl.load(starts_ptr + row * (chunks + 1) + tl.program_id(0))
    if start < entries:
        keys_ptr += row * entries + start
        order_ptr += row * entries + start
        blocks_ptr += (row * tokens + lo) * TOPK
        page = tl.load(keys_ptr)
        nth = tl.arange(0, CHUNK)
        same = tl.load(keys_ptr + nth, mask=start + nth < entries, other=-1) == page
        count = tl.sum(same.to(tl.int32), 0)
        # Whose turn it will be is read once, in the loop it would stand before the queries' own latency; and around the
        # page's halves, each of which is waited for.
        entry = tl.load(order_ptr + nth, mask=nth < count, other=0).to(tl.int32)
        k = tl.trans(to_dot(k_pages.load([page, r, 0, 0]).reshape([BLOCK, D]), DOT))
        block = tl.load(blocks_ptr + entry, mask=nth < count, other=0)
        position = tl.load(positions_ptr + lo + entry // TOPK, mask=nth < count, other=-1).to(tl.int32)
        v = to_dot(v_pages.load([page, r, 0, 0]).reshape([BLOCK, D]), DOT)
        last = position - block * BLOCK
        if K_SCALED:
            score_mul *= tl.load(k_scale_ptr + page.to(tl.int64) * k_scale_page + r * k_scale_head)
        if V_SCALED:
            v_mul *= tl.load(v_scale_ptr + page.to(tl.int64) * v_scale_page + r * v_scale_head)
        rows = tl.arange(0, QUERIES * GROUP)
        head = rows % GROUP
        d = tl.arange(0, D)
        key = tl.arange(0, BLOCK)
        for i in tl.range(0, count, QUERIES, num_stages=STAGES):
            at = i + rows // GROUP
            real = at < count
            mine = of_row(entry, nth, at)
            query = (mine // TOPK).to(tl.int64)
            q_at = q_ptr + (lo + query) * q_token + (r * GROUP + head) * q_head
            q = tl.load(q_at[:, None] + d[None], mask=real[:, None], other=0.0, eviction_policy="evict_last")
            seen = key[None] <= of_row(last, nth, at)[:, None]
            scores = tl.where(seen, tl.dot(q, k) * score_mul, -INF)
            top = tl.max(scores, 1)
            p = tl.exp2(scores - tl.where(top == -INF, 0.0, top)[:, None])
            total = tl.sum(p, 1)
            some = total > 0.0
            whole = tl.where(some, total, 1.0)
            out = tl.dot(p.to(DOT), v)
            share = v_mul / whole
            peak = tl.max(tl.abs(out), 1) * tl.abs(share)
            unit = (peak.to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True)
            unit = tl.where(unit > 0.0, unit, 1.0)
            to = (query * GROUP + head) * TOPK + mine % TOPK
            out *= (share / unit)[:, None]
            part_at = part_ptr + to[:, None] * D + d[None]
            tl.store(part_at, out.to(tl.float16), mask=real[:, None], eviction_policy=PASSING)
            tl.store(unit_ptr + to, unit, mask=real)
            tl.store(part_lse_ptr + to, tl.where(some, (top + tl.log2(whole)) * LN2, -INF), mask=real)


@triton.jit(do_not_specialize=["lo", "tokens", "heads", "r"])
def join_slots(
    part_ptr, unit_ptr, part_lse_ptr, out_ptr, lse_ptr, blocks_ptr, tile_ptr, length_ptr, lo, tokens, heads, r,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr, TOPK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One query's heads of a group, if its tile was not attended to as one: its union's length is then negative."""
    query = tl.program_id(0).to(tl.int64)
    if tl.load(length_ptr + tl.load(tile_ptr + query) * HEADS + r // SHARE) < 0:
        slot = tl.arange(0, TOPK)
        d = tl.arange(0, D)
        real = tl.load(blocks_ptr + ((r // SHARE) * tokens + lo + query) * TOPK + slot) >= 0
        for head in range(0, GROUP):
            at = (query * GROUP + head) * TOPK + slot
            lse = tl.load(part_lse_ptr + at, mask=real, other=-INF)
            x = tl.load(part_ptr + at[:, None] * D + d[None], mask=real[:, None], other=0.0, eviction_policy=PASSING)
            top = tl.max(lse, 0)
            safe = tl.where(top == -INF, 0.0, top)
            weight = tl.exp(lse - safe)
            total = tl.sum(weight, 0)
            whole = tl.where(total > 0.0, total, 1.0)
            weight *= tl.load(unit_ptr + at, mask=real, other=0.0)
            out = tl.sum(x.to(tl.float32) * weight[:, None], 0) / whole
            to = (lo + query) * heads + r * GROUP + head
            tl.store(out_ptr + to * D + d, out.to(out_ptr.dtype.element_ty))
            tl.store(lse_ptr + to, tl.where(total > 0.0, safe + tl.log(whole), -INF))
