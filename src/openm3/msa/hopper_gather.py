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


def by_page(pages: Tensor, pool: int, chunk: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """int32 [Hi, E] pages below `pool`, or `pool` for none -> in order, whence each came int64 [Hi, E], chunks.

    A chunk is at most `chunk` entries of one page; where each begins is int64 [Hi, `most` + 1], E behind the last one.
    """
    heads, entries = pages.shape
    head = torch.arange(heads, device=pages.device)[:, None]
    # One long sort: each head's pages in a range of their own.
    keys, order = (pages + (head * (pool + 1)).to(pages.dtype)).flatten().sort(stable=True)
    keys = keys.view(heads, entries) - (head * (pool + 1)).to(pages.dtype)
    order = order.view(heads, entries) - head * entries
    nth = torch.arange(entries, device=keys.device).expand_as(keys)
    fresh = torch.ones_like(keys, dtype=torch.bool)
    fresh[:, 1:] = keys[:, 1:] != keys[:, :-1]
    since = nth - torch.where(fresh, nth, 0).cummax(dim=1).values
    begins = (since % chunk == 0) & (keys != pool)
    slot = torch.where(begins, begins.cumsum(1) - 1, most)
    starts = torch.full((len(keys), most + 1), entries, dtype=torch.int64, device=keys.device)
    starts.scatter_(1, slot, torch.where(begins, nth, entries))
    return keys, order, starts


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
        k = tl.trans(to_dot(k_pages.load([page, r, 0, 0]).reshape([BLOCK, D]), DOT))
        v = to_dot(v_pages.load([page, r, 0, 0]).reshape([BLOCK, D]), DOT)
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
            entry = tl.load(order_ptr + at, mask=real, other=0)
            block = tl.load(blocks_ptr + entry, mask=real, other=0)
            query = entry // TOPK
            q_at = q_ptr + (lo + query) * q_token + (r * GROUP + head) * q_head
            q = tl.load(q_at[:, None] + d[None], mask=real[:, None], other=0.0)
            last = tl.load(positions_ptr + lo + query, mask=real, other=-1).to(tl.int32) - block * BLOCK
            scores = tl.where(key[None] <= last[:, None], tl.dot(q, k) * score_mul, -INF)
            top = tl.max(scores, 1)
            p = tl.exp2(scores - tl.where(top == -INF, 0.0, top)[:, None])
            total = tl.sum(p, 1)
            some = total > 0.0
            whole = tl.where(some, total, 1.0)
            out = tl.dot(p.to(DOT), v) * (v_mul / whole)[:, None]
            unit = (tl.max(tl.abs(out), 1).to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True)
            unit = tl.where(unit > 0.0, unit, 1.0)
            to = (query * GROUP + head) * TOPK + entry % TOPK
            tl.store(part_ptr + to[:, None] * D + d[None], (out / unit[:, None]).to(tl.float16), mask=real[:, None])
            tl.store(unit_ptr + to, unit, mask=real)
            tl.store(part_lse_ptr + to, tl.where(some, (top + tl.log2(whole)) * LN2, -INF), mask=real)


@triton.jit(do_not_specialize=["lo", "tokens", "heads", "r"])
def join_slots(
    part_ptr, unit_ptr, part_lse_ptr, out_ptr, lse_ptr, blocks_ptr, tile_ptr, length_ptr, lo, tokens, heads, r,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr, TOPK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One query head of one query, if its tile was not attended to as one: its union's length is then negative."""
    query = (tl.program_id(0) // GROUP).to(tl.int64)
    head = tl.program_id(0) % GROUP
    if tl.load(length_ptr + tl.load(tile_ptr + query) * HEADS + r // SHARE) < 0:
        slot = tl.arange(0, TOPK)
        d = tl.arange(0, D)
        real = tl.load(blocks_ptr + ((r // SHARE) * tokens + lo + query) * TOPK + slot) >= 0
        at = (query * GROUP + head) * TOPK + slot
        lse = tl.load(part_lse_ptr + at, mask=real, other=-INF)
        x = tl.load(part_ptr + at[:, None] * D + d[None], mask=real[:, None], other=0.0).to(tl.float32)
        top = tl.max(lse, 0)
        safe = tl.where(top == -INF, 0.0, top)
        weight = tl.exp(lse - safe)
        total = tl.sum(weight, 0)
        whole = tl.where(total > 0.0, total, 1.0)
        weight *= tl.load(unit_ptr + at, mask=real, other=0.0)
        to = (lo + query) * heads + r * GROUP + head
        tl.store(out_ptr + to * D + d, (tl.sum(x * weight[:, None], 0) / whole).to(out_ptr.dtype.element_ty))
        tl.store(lse_ptr + to, tl.where(total > 0.0, safe + tl.log(whole), -INF))
