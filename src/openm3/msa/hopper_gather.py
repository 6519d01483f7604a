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
WIDE = 1024  # pairs that one program puts in order
PASSING = tl.constexpr("evict_first")  # parts are more than the L2 holds, and would drive the queries out of it


@dataclass(frozen=True)
class Cut:
    """How the pairs of a query and one of its blocks are cut into chunks, which are of one page: at every multiple of
    `chunk` pairs. Or, with `shares`, where one of so many equal shares ends; then a chunk passes through its page
    `chunk` pairs at a time, the last ones of which may be fewer, and results of whole passes are put down. Whoever
    takes shares in turn keeps to one of `windows` equal runs of queries for a while, which the L2 may then hold."""

    chunk: int
    shares: int = 0
    windows: int = 1

    def sizes(self, count: int, seen: int) -> tuple[int, int]:
        """Of `count` pairs over `seen` blocks of all sequences: the most chunks, and places for results."""
        chunks = (self.shares or -(-count // self.chunk)) + min(count, 2 * seen * self.windows)
        return chunks, count + self.spare * chunks

    @property
    def spare(self) -> int:
        """Places behind each chunk that its last pass may write beyond it."""
        return self.chunk - 1 if self.shares else 0


@dataclass(frozen=True)
class Turns:
    """Pairs in the order of their window, their page, and whether they see all of it, int32 [Hi, pairs]: `pages`,
    `queries` (counted from the first of the piece), `lasts` (the last key of its page that the query sees). Chunk c
    begins at starts[c] // 2, `starts` [Hi, chunks at most + 2], and ends where the next one does; starts[c] is odd
    where all pairs of the chunk see all: one number, since every reader needs both. Share n has chunks firsts[n] ..
    firsts[n + 1], and the last of `firsts` [Hi, shares + 1] is how many there are. `places` [Hi, pairs]: where the
    result of (query, slot) is put, -1 for none, -2 for one of a tile that is not gathered; all are below `room`."""

    pages: Tensor
    queries: Tensor
    lasts: Tensor
    starts: Tensor
    firsts: Tensor
    places: Tensor
    room: int


def by_page(
    blocks: Tensor, plan: Plan, lo: int, hi: int, tile_of: Tensor, lengths: Tensor, pool: int, seen: int, cut: Cut
) -> Turns:
    """The pairs of queries lo .. hi, of blocks [Hi, T, topk], whose tile (`tile_of`) has a negative length [n, Hi];
    pages are of a `pool`, blocks of all sequences `seen`."""
    heads, tokens, topk = blocks.shape
    count, device = (hi - lo) * topk, blocks.device
    most, room = cut.sizes(count, seen)
    window, windows = -(-(hi - lo) // cut.windows), cut.windows

    def row(n: int) -> Tensor:
        return torch.empty(heads, n, dtype=torch.int32, device=device)

    keys, begins, pages, queries, lasts, places = (row(count) for _ in range(6))
    starts, firsts, totals = row(most + 2), row(cut.shares + 1), row(1).zero_()
    grid = (triton.cdiv(count, WIDE), heads)
    sized = dict(SHARED=cut.shares > 0, CHUNK=cut.chunk, WIDE=WIDE, num_warps=4)
    page_keys[grid](
        blocks, plan.page_table, plan.seq_ids, plan.positions, tile_of, lengths, keys, totals, count, lo, tokens,
        plan.page_table.stride(0), plan.page_table.stride(1), pool, window, windows, HEADS=heads, TOPK=topk,
        BLOCK=plan.block_size, WIDE=WIDE, num_warps=4,
    )  # fmt: skip
    keys, order = keys.flatten().sort(stable=True)
    chunk_begins[grid](keys, begins, totals, count, cut.shares, **sized)
    counted = begins.flatten().cumsum(0, dtype=torch.int32)
    whose_turn[grid](
        keys, order, counted, totals, blocks, plan.positions, pages, queries, lasts, starts, firsts, places, count,
        most, lo, tokens, pool, windows, cut.shares, tile_of, lengths, HEADS=heads, SPARE=cut.spare, TOPK=topk,
        BLOCK=plan.block_size, **sized,
    )  # fmt: skip
    return Turns(pages, queries, lasts, starts, firsts, places, room)


@triton.jit(do_not_specialize=["count", "lo", "tokens", "table_row", "table_column", "pool", "window", "windows"])
def page_keys(
    blocks_ptr, table_ptr, seq_ptr, positions_ptr, tile_ptr, length_ptr, keys_ptr, totals_ptr, count, lo, tokens,
    table_row, table_column, pool, window, windows, HEADS: tl.constexpr, TOPK: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """What one head's pairs are sorted by: head, window, page, whether all of it is seen; behind all those that are not
    gathered. How many are."""
    row = tl.program_id(1)
    at = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    real = at < count
    query = at // TOPK
    block = tl.load(blocks_ptr + (row.to(tl.int64) * tokens + lo) * TOPK + at, mask=real, other=-1)
    tile = tl.load(tile_ptr + query, mask=real, other=0)
    wanted = (tl.load(length_ptr + tile * HEADS + row, mask=real, other=0) < 0) & (block >= 0)
    seq = tl.load(seq_ptr + lo + query, mask=real, other=0)
    page = tl.load(table_ptr + seq * table_row + block * table_column, mask=wanted, other=0)
    whole = tl.load(positions_ptr + lo + query, mask=real, other=-1) - block * BLOCK >= BLOCK - 1
    key = 2 * tl.where(wanted, query // window * pool + page, windows * pool) + (wanted & whole)
    tl.store(keys_ptr + row * count + at, key + row * (2 * windows * pool + 1), mask=real)
    tl.atomic_add(totals_ptr + row, tl.sum(wanted.to(tl.int32), 0))


@triton.jit
def _multiple(total, shares, SHARED: tl.constexpr, CHUNK: tl.constexpr):
    """At whose multiples a chunk ends at the latest, of `total` pairs (`Cut`)."""
    if SHARED:
        return tl.maximum(tl.cdiv(total, shares * CHUNK), 1) * CHUNK
    else:
        return CHUNK


@triton.jit(do_not_specialize=["count", "shares"])
def chunk_begins(
    keys_ptr, begins_ptr, totals_ptr, count, shares, SHARED: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr
):
    """1 where a chunk of one head's sorted pairs begins."""
    row = tl.program_id(1)
    at = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    real = at < count
    keys_ptr += row * count
    key = tl.load(keys_ptr + at, mask=real, other=0)
    before = tl.load(keys_ptr + at - 1, mask=real & (at > 0), other=-1)
    total = tl.load(totals_ptr + row)
    begins = (at < total) & ((key != before) | (at % _multiple(total, shares, SHARED, CHUNK) == 0))
    tl.store(begins_ptr + row * count + at, begins.to(tl.int32), mask=real)


@triton.jit(do_not_specialize=["count", "most", "lo", "tokens", "pool", "windows", "shares"])
def whose_turn(
    keys_ptr, order_ptr, counted_ptr, totals_ptr, blocks_ptr, positions_ptr, pages_ptr, queries_ptr, lasts_ptr,
    starts_ptr, firsts_ptr, places_ptr, count, most, lo, tokens, pool, windows, shares, tile_ptr, length_ptr,
    HEADS: tl.constexpr, SPARE: tl.constexpr, TOPK: tl.constexpr, BLOCK: tl.constexpr, SHARED: tl.constexpr,
    CHUNK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One head's places in the order, WIDE of them: the page, whose pair is there, how far it sees, where its result
    goes; where chunks and shares begin."""
    row = tl.program_id(1)
    at = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    real = at < count
    here = row * count + at
    key = tl.load(keys_ptr + here, mask=real, other=0) - row * (2 * windows * pool + 1)
    pair = (tl.load(order_ptr + here, mask=real, other=0) - row * count).to(tl.int32)
    block = tl.load(blocks_ptr + (row.to(tl.int64) * tokens + lo) * TOPK + pair, mask=real, other=0)
    position = tl.load(positions_ptr + lo + pair // TOPK, mask=real, other=-1).to(tl.int32)
    tl.store(pages_ptr + here, (key >> 1) % pool, mask=real)
    tl.store(queries_ptr + here, pair // TOPK, mask=real)
    tl.store(lasts_ptr + here, position - block * BLOCK, mask=real)
    before = tl.load(counted_ptr + row * count - 1, mask=row > 0, other=0)
    chunk = tl.load(counted_ptr + here, mask=real, other=0) - before - 1
    earlier = tl.load(counted_ptr + here - 1, mask=real & (at > 0), other=0)
    begins = real & (chunk > tl.where(at > 0, earlier - before - 1, -1))
    total = tl.load(totals_ptr + row)
    tile = tl.load(tile_ptr + pair // TOPK, mask=real & (at >= total), other=0)
    nowhere = tl.where(tl.load(length_ptr + tile * HEADS + row, mask=real & (at >= total), other=0) < 0, -1, -2)
    tl.store(places_ptr + row * count + pair, tl.where(at < total, at + chunk * SPARE, nowhere), mask=real)
    starts_ptr += row * (most + 2)
    firsts_ptr += row * (shares + 1)
    tl.store(starts_ptr + chunk, 2 * at + (key & 1), mask=begins)
    cut = _multiple(total, shares, SHARED, CHUNK)
    if SHARED:
        tl.store(firsts_ptr + at // cut, chunk, mask=begins & (at % cut == 0))
    if tl.program_id(0) == 0:
        chunks = tl.load(counted_ptr + (row + 1) * count - 1) - before
        tl.store(starts_ptr + chunks, 2 * total)
        tl.store(starts_ptr + chunks + 1, 2 * total)
        for begin in range(0, shares + 1, WIDE):
            share = begin + tl.arange(0, WIDE)
            none = ((share * cut >= total) & (share < shares)) | (share == shares)
            tl.store(firsts_ptr + share, chunks + 0 * share, mask=none)


@triton.jit
def of_row(values, nth, at):
    """values[at] of a short row, `at` a column."""
    return tl.sum(tl.where(nth[None] == at[:, None], values[None], 0), 1)


@triton.jit(do_not_specialize=["count", "most", "lo", "head0"])
def attend_gathered(
    q_ptr, k_pages, v_pages, k_scale_ptr, v_scale_ptr, pages_ptr, queries_ptr, lasts_ptr, starts_ptr, firsts_ptr,
    part_ptr, unit_ptr, part_lse_ptr, q_token, q_head, k_scale_page, k_scale_head, v_scale_page, v_scale_head, count,
    most, lo, head0, score_mul, v_mul, GROUP: tl.constexpr, SHARE: tl.constexpr, QUERIES: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, K_SCALED: tl.constexpr, V_SCALED: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One chunk of queries lo .. and one KV head. Parts lie as [place, head of the group, D], float16 in units of a
    row's largest number: bfloat16 would round the result twice."""
    r = head0 + tl.program_id(1)
    row = (r // SHARE).to(tl.int64)
    if tl.program_id(0) < tl.load(firsts_ptr + row):
        start = tl.load(starts_ptr + row * (most + 2) + tl.program_id(0)) // 2
        turns = tl.load(starts_ptr + row * (most + 2) + tl.program_id(0) + 1) // 2 - start
        page = tl.load(pages_ptr + row * count + start)
        nth = tl.arange(0, CHUNK)
        # Whose turn it will be is read once: in the loop it would stand before the queries' own latency.
        query = tl.load(queries_ptr + row * count + start + nth, mask=nth < turns, other=0)
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
            q_at = q_ptr + (lo + of_row(query, nth, at)).to(tl.int64) * q_token + (r * GROUP + head) * q_head
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
            to = (start + at).to(tl.int64) * GROUP + head
            out *= (share / unit)[:, None]
            part_at = part_ptr + to[:, None] * D + d[None]
            tl.store(part_at, out.to(tl.float16), mask=real[:, None], eviction_policy=PASSING)
            tl.store(unit_ptr + to, unit, mask=real)
            tl.store(part_lse_ptr + to, tl.where(some, (top + tl.log2(whole)) * LN2, -INF), mask=real)


@triton.jit(do_not_specialize=["count", "lo", "heads", "r"])
def join_slots(
    part_ptr, unit_ptr, part_lse_ptr, out_ptr, lse_ptr, places_ptr, count, lo, heads, r, GROUP: tl.constexpr,
    SHARE: tl.constexpr, HEADS: tl.constexpr, TOPK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """HEADS of one query's heads of a group, if its tile was gathered."""
    query = (tl.program_id(0) // (GROUP // HEADS)).to(tl.int64)
    slots = tl.arange(0, TOPK)
    places_ptr += (r // SHARE).to(tl.int64) * count + query * TOPK
    place = tl.load(places_ptr + slots)
    if tl.max(place, 0) > -2:
        head = tl.program_id(0) % (GROUP // HEADS) * HEADS + tl.arange(0, HEADS)
        d = tl.arange(0, D)
        at = tl.maximum(place, 0).to(tl.int64)[:, None] * GROUP + head[None]
        lse = tl.where((place >= 0)[:, None], tl.load(part_lse_ptr + at), -INF)
        unit = tl.load(unit_ptr + at)
        top = tl.max(lse, 0)
        safe = tl.where(top == -INF, 0.0, top)
        weights = tl.exp(lse - safe[None])
        total = tl.sum(weights, 0)
        whole = tl.where(total > 0.0, total, 1.0)
        weights = tl.where(weights > 0.0, weights * unit / whole[None], 0.0)
        out = tl.zeros([HEADS, D], tl.float32)
        for slot in tl.static_range(TOPK):
            # Where no block was selected something is read too: a mask would let the load wait for the weights.
            at = tl.maximum(tl.load(places_ptr + slot), 0).to(tl.int64) * GROUP + head
            x = tl.load(part_ptr + at[:, None] * D + d[None], eviction_policy=PASSING).to(tl.float32)
            weight = tl.sum(tl.where(slots[:, None] == slot, weights, 0.0), 0)[:, None]
            out += tl.where(weight > 0.0, x, 0.0) * weight
        to = (lo + query) * heads + r * GROUP + head
        tl.store(out_ptr + to[:, None] * D + d[None], out.to(out_ptr.dtype.element_ty))
        tl.store(lse_ptr + to, tl.where(total > 0.0, safe + tl.log(whole), -INF))
