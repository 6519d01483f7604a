"""Sparse attention of a prompt where neighbouring queries do not agree: keys outside, queries gathered.

Whoever selected one page stands together (`by_page`), in chunks. A program keeps the page's keys and values and lets
its queries pass with all heads of a group, so that a page is read once in a chunk and no product works on rows that did
not ask for it: `attend_pages` (`hopper_page.py`) for bf16 and fp16 pages, `attend_gathered` here for fp8 ones, and for
all in Triton's interpreter. Each pass leaves one partial output a (query, slot, head); joining them is a second kernel.
The order of all follows from a stable sort: the same input gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from openm3.msa.plan import Plan
from openm3.msa.triton_select import to_dot

INF = tl.constexpr(float("inf"))
LN2 = tl.constexpr(0.6931471805599453)
WIDE = 1024  # entries that one program puts in order
PASSING = tl.constexpr("evict_first")  # parts are more than the L2 holds, and would drive the queries out of it


@dataclass(frozen=True)
class Turns:
    """Entries (query, slot) in the order of their pages, int32 [Hi, E]: `pages`, `entries` (query * topk + slot),
    `lasts` (the last key of its page that the query sees). Chunk c of the first `chunks` [Hi] begins at `starts`
    [Hi, most + 1], and ends where the next one does."""

    pages: Tensor
    entries: Tensor
    lasts: Tensor
    starts: Tensor
    chunks: Tensor


def by_page(
    blocks: Tensor, plan: Plan, lo: int, hi: int, tile_of: Tensor, lengths: Tensor, pool: int, chunk: int, most: int
) -> Turns:
    """The entries of queries lo .. hi, of blocks [Hi, T, topk], whose tile (`tile_of`) has a negative length [n, Hi].

    A chunk is at most `chunk` entries of one page of `pool`, and there are at most `most`."""
    heads, tokens, topk = blocks.shape
    count, device = (hi - lo) * topk, blocks.device
    keys, pages, entries, lasts = (torch.empty(heads, count, dtype=torch.int32, device=device) for _ in range(4))
    begins, starts = torch.empty_like(keys), torch.empty(heads, most + 1, dtype=torch.int32, device=device)
    chunks = torch.empty(heads, dtype=torch.int32, device=device)
    grid = (triton.cdiv(count, WIDE), heads)
    page_keys[grid](
        blocks, plan.page_table, plan.seq_ids, tile_of, lengths, keys, count, lo, tokens, plan.page_table.stride(0),
        plan.page_table.stride(1), pool, HEADS=heads, TOPK=topk, WIDE=WIDE, num_warps=4,
    )  # fmt: skip
    keys, order = keys.flatten().sort(stable=True)
    chunk_begins[grid](keys, begins, count, count.bit_length(), pool, CHUNK=chunk, WIDE=WIDE, num_warps=4)
    counted = begins.flatten().cumsum(0, dtype=torch.int32)
    whose_turn[grid](
        keys, order, counted, blocks, plan.positions, pages, entries, lasts, starts, chunks, count, most, lo, tokens,
        pool, TOPK=topk, BLOCK=plan.block_size, WIDE=WIDE, num_warps=4,
    )  # fmt: skip
    return Turns(pages, entries, lasts, starts, chunks)


@triton.jit(do_not_specialize=["count", "lo", "tokens", "table_row", "table_column", "pool"])
def page_keys(
    blocks_ptr, table_ptr, seq_ptr, tile_ptr, length_ptr, keys_ptr, count, lo, tokens, table_row, table_column,
    pool, HEADS: tl.constexpr, TOPK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What one head's entries are sorted by: head, page; behind all pages those that are not gathered."""
    row = tl.program_id(1)
    at = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    real = at < count
    query = at // TOPK
    block = tl.load(blocks_ptr + (row.to(tl.int64) * tokens + lo) * TOPK + at, mask=real, other=-1)
    tile = tl.load(tile_ptr + query, mask=real, other=0)
    wanted = (tl.load(length_ptr + tile * HEADS + row, mask=real, other=0) < 0) & (block >= 0)
    seq = tl.load(seq_ptr + lo + query, mask=real, other=0)
    page = tl.load(table_ptr + seq * table_row + block * table_column, mask=wanted, other=0)
    key = tl.where(wanted, page, pool) + row * (pool + 1)
    tl.store(keys_ptr + row * count + at, key, mask=real)


@triton.jit(do_not_specialize=["count", "steps", "pool"])
def chunk_begins(keys_ptr, begins_ptr, count, steps, pool, CHUNK: tl.constexpr, WIDE: tl.constexpr):
    """1 where a chunk of one head's sorted entries begins: every CHUNK places from the first of a page."""
    row = tl.program_id(1)
    at = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    real = at < count
    keys_ptr += row * count
    key = tl.load(keys_ptr + at, mask=real, other=0)
    low, high = tl.zeros_like(at), at
    for _ in range(steps):  # the first place of this key
        middle = (low + high) // 2
        less = tl.load(keys_ptr + middle, mask=real, other=0) < key
        low = tl.where(less, middle + 1, low)
        high = tl.where(less, high, middle)
    begins = (key - row * (pool + 1) < pool) & ((at - low) % CHUNK == 0)
    tl.store(begins_ptr + row * count + at, begins.to(tl.int32), mask=real)


@triton.jit(do_not_specialize=["count", "most", "lo", "tokens", "pool"])
def whose_turn(
    keys_ptr, order_ptr, counted_ptr, blocks_ptr, positions_ptr, pages_ptr, entries_ptr, lasts_ptr, starts_ptr,
    chunks_ptr, count, most, lo, tokens, pool, TOPK: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One head's places in the order, WIDE of them: the page, the entry there, how far it sees; where chunks begin."""
    row = tl.program_id(1)
    at = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    real = at < count
    here = row * count + at
    page = tl.load(keys_ptr + here, mask=real, other=0) - row * (pool + 1)
    entry = (tl.load(order_ptr + here, mask=real, other=0) - row * count).to(tl.int32)
    block = tl.load(blocks_ptr + (row.to(tl.int64) * tokens + lo) * TOPK + entry, mask=real, other=0)
    position = tl.load(positions_ptr + lo + entry // TOPK, mask=real, other=-1).to(tl.int32)
    tl.store(pages_ptr + here, page, mask=real)
    tl.store(entries_ptr + here, entry, mask=real)
    tl.store(lasts_ptr + here, position - block * BLOCK, mask=real)
    before = tl.load(counted_ptr + row * count - 1, mask=row > 0, other=0)
    counted = tl.load(counted_ptr + here, mask=real, other=0) - before
    earlier = tl.load(counted_ptr + here - 1, mask=real & (at > 0), other=0)
    earlier = tl.where(at > 0, earlier - before, 0)
    starts_ptr += row * (most + 1)
    tl.store(starts_ptr + counted - 1, at, mask=real & (counted > earlier))
    following = tl.load(keys_ptr + here + 1, mask=at + 1 < count, other=0) - row * (pool + 1)
    ends = (page < pool) & ((at + 1 == count) | (following == pool))
    tl.store(starts_ptr + counted, at + 1, mask=real & ends)
    tl.store(chunks_ptr + row + 0 * at, counted, mask=at + 1 == count)


@triton.jit
def of_row(values, nth, at):
    """values[at] of a short row, `at` a column."""
    return tl.sum(tl.where(nth[None] == at[:, None], values[None], 0), 1)


@triton.jit(do_not_specialize=["count", "most", "lo", "head0"])
def attend_gathered(
    q_ptr, k_pages, v_pages, k_scale_ptr, v_scale_ptr, pages_ptr, entries_ptr, lasts_ptr, starts_ptr, chunks_ptr,
    part_ptr, unit_ptr, part_lse_ptr, q_token, q_head, k_scale_page, k_scale_head, v_scale_page, v_scale_head, count,
    most, lo, head0, score_mul, v_mul, GROUP: tl.constexpr, SHARE: tl.constexpr, TOPK: tl.constexpr,
    QUERIES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, K_SCALED: tl.constexpr,
    V_SCALED: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One chunk of queries and one KV head. Parts of queries lo .. lie as [query, slot, head of the group, D], float16
    in units of a row's largest number: bfloat16 would round the result twice."""
    r = head0 + tl.program_id(1)
    row = (r // SHARE).to(tl.int64)
    if tl.program_id(0) < tl.load(chunks_ptr + row):
        start = tl.load(starts_ptr + row * (most + 1) + tl.program_id(0))
        turns = tl.load(starts_ptr + row * (most + 1) + tl.program_id(0) + 1) - start
        page = tl.load(pages_ptr + row * count + start)
        nth = tl.arange(0, CHUNK)
        # Whose turn it will be is read once: in the loop it would stand before the queries' own latency.
        entry = tl.load(entries_ptr + row * count + start + nth, mask=nth < turns, other=0)
        last = tl.load(lasts_ptr + row * count + start + nth, mask=nth < turns, other=-1)
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
        for i in tl.range(0, turns, QUERIES, num_stages=STAGES):
            at = i + rows // GROUP
            real = at < turns
            mine = of_row(entry, nth, at)
            q_at = q_ptr + (lo + mine // TOPK).to(tl.int64) * q_token + (r * GROUP + head) * q_head
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
            unit = tl.max(tl.abs(out), 1) * tl.abs(share)
            unit = tl.where(unit > 0.0, unit, 1.0)
            to = mine.to(tl.int64) * GROUP + head
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
        slots = tl.arange(0, TOPK)
        head = tl.arange(0, GROUP)
        d = tl.arange(0, D)
        blocks_ptr += ((r // SHARE) * tokens + lo + query) * TOPK
        at = (query * TOPK + slots)[:, None] * GROUP + head[None]
        real = (tl.load(blocks_ptr + slots) >= 0)[:, None]
        lse = tl.load(part_lse_ptr + at, mask=real, other=-INF)
        unit = tl.load(unit_ptr + at, mask=real, other=0.0)
        top = tl.max(lse, 0)
        safe = tl.where(top == -INF, 0.0, top)
        weights = tl.exp(lse - safe[None])
        total = tl.sum(weights, 0)
        whole = tl.where(total > 0.0, total, 1.0)
        weights *= unit / whole[None]
        out = tl.zeros([GROUP, D], tl.float32)
        for slot in tl.static_range(TOPK):
            # Whatever stands where no block was selected is read too: a mask would let the load wait for the blocks.
            at = (query * TOPK + slot) * GROUP + head
            x = tl.load(part_ptr + at[:, None] * D + d[None], eviction_policy=PASSING).to(tl.float32)
            weight = tl.sum(tl.where(slots[:, None] == slot, weights, 0.0), 0)[:, None]
            out += tl.where(weight > 0.0, x, 0.0) * weight
        to = (lo + query) * heads + r * GROUP + head
        tl.store(out_ptr + to[:, None] * D + d[None], out.to(out_ptr.dtype.element_ty))
        tl.store(lse_ptr + to, tl.where(total > 0.0, safe + tl.log(whole), -INF))
