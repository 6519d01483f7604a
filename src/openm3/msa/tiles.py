"""Block-sparse attention inside out: sort the (query, block) pairs by block, multiply tile by tile, combine by query.

A pair is one of a query's selected blocks. Pairs of the same block and KV head are cut into tiles of a few queries,
whose grouped heads are the rows of one small product with that block's keys; all tiles of a piece run as one batched
product. Blocks before the query's own are visible as a whole, so only the own block's tiles carry a mask. A query's
partial outputs are then combined by their log-sum-exp. The backward pass walks the same tiles and recomputes the
weights. Memory: one strip of queries' partial outputs and one piece's scores, whatever the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from openm3.msa.keys import Scale, dequantize
from openm3.msa.plan import Plan

INF = float("inf")
STRIP = 2048  # queries whose partial outputs are held at a time, less where the workspace is small
TILE_ROWS = 128  # rows of one product: enough for a CPU's full rate, few enough to waste little on padding
PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class Keys:
    """One sequence's keys and values [pages, Hkv, block, D]; block b is page `ids[b]`, or page b where ids is None."""

    k: Tensor
    v: Tensor
    ids: Tensor | None
    count: int
    k_scale: Scale = None
    v_scale: Scale = None

    def take(self, cache: Tensor, scale: Scale, block: Tensor, head: Tensor, dtype: torch.dtype) -> Tensor:
        """[tiles, block, D] of the given blocks and heads, dequantized."""
        at = (block if self.ids is None else self.ids[block], head)
        return dequantize(cache[at], scale, at).to(dtype)


class Tiles:
    """The kept pairs of C queries, by (block, KV head), in tiles of `size` pairs.

    `pairs` int64 [tiles, size]: (query * Hkv + head) * topk + slot; padding holds `total`, one behind the last pair.
    `block`, `head` int64 [tiles].
    """

    def __init__(self, keep: Tensor, blocks: Tensor, count: int, size: int):
        _, hkv, topk = blocks.shape
        pair = keep.flatten().nonzero().squeeze(-1)
        key = blocks.flatten()[pair].long() * hkv + (pair // topk) % hkv
        key, order = key.sort(stable=True)
        sizes = torch.bincount(key, minlength=count * hkv)
        tiles = (sizes + size - 1) // size
        start = (tiles.cumsum(0) - tiles) * size - (sizes.cumsum(0) - sizes)  # where a group's first pair moves to
        self.total = blocks.numel()
        pairs = pair.new_full((int(tiles.sum()) * size,), self.total)
        pairs[torch.arange(len(pair), device=pair.device) + start[key]] = pair[order]
        self.pairs = pairs.view(-1, size)
        owner = torch.repeat_interleave(torch.arange(len(tiles), device=pair.device), tiles)
        self.block, self.head = owner // hkv, owner % hkv


@dataclass(frozen=True)
class Strip:
    """C queries on their way through the tiles. `queries` [C * Hkv, G, D] are scaled; `own` int64 [C] own blocks."""

    queries: Tensor
    positions: Tensor
    past: Tiles
    own: Tiles
    topk: int
    block_size: int

    def pieces(self, bytes_per_row: int) -> Iterator[tuple[Tiles, slice, bool]]:
        """(tiles, a range of them whose scores fit in PIECE_BYTES, whether they need a mask)."""
        for tiles, masked in ((self.past, False), (self.own, True)):
            size = max(1, PIECE_BYTES // (bytes_per_row * self.queries.shape[1] * max(1, tiles.pairs.shape[1])))
            for a in range(0, len(tiles.pairs), size):
                yield tiles, slice(a, a + size), masked

    def query_of(self, tiles: Tiles, piece: slice) -> Tensor:
        """int64 [tiles, size]: the row of `queries` behind each pair; any row for padding."""
        return (tiles.pairs[piece] // self.topk).clamp_max_(len(self.queries) - 1)

    def scores(self, tiles: Tiles, piece: slice, masked: bool, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [tiles, size * G, D] and their scores against the tiles' keys [tiles, size * G, block]."""
        query = self.query_of(tiles, piece)
        rows = self.queries[query].flatten(1, 2)
        scores = torch.bmm(rows, key.transpose(1, 2))
        if masked:
            hkv = len(self.queries) // len(self.positions)
            last = self.positions[query // hkv] % self.block_size  # the last visible key of the own block
            hidden = (
                torch.arange(self.block_size, device=last.device) > last[..., None, None]
            )  # [tiles, size, 1, block]
            scores.view(*query.shape, -1, self.block_size).masked_fill_(hidden, -INF)
        return rows, scores


def _strips(q: Tensor, blocks: Tensor, positions: Tensor, keys: Keys, plan: Plan, scale: float):
    """Yields (rows, Strip) over the queries, sized by the workspace bound."""
    hq, d = q.shape[1:]
    hkv = keys.k.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    per_query = plan.topk * (hq * (d + 1) * wide.itemsize * 2 + hkv * 64)
    size = max(16, min(STRIP, plan.workspace_bytes // 2 // per_query))
    for a in range(0, len(q), size):
        rows = slice(a, min(a + size, len(q)))
        mine = blocks[:, rows].repeat_interleave(hkv // len(blocks), dim=0).permute(1, 0, 2)  # [C, Hkv, topk]
        own = (positions[rows] // plan.block_size)[:, None, None]
        inside = (mine >= 0) & (mine < keys.count)
        queries = (q[rows].to(wide) * scale).reshape(-1, hq // hkv, d)
        tile = _tile_size(len(mine) * plan.topk // max(1, keys.count), hq // hkv)
        past = Tiles(inside & (mine < own), mine, keys.count, tile)
        yield rows, Strip(
            queries, positions[rows], past, Tiles(inside & (mine == own), mine, keys.count, tile), plan.topk,
            plan.block_size,
        )  # fmt: skip


def _tile_size(pairs_per_block: int, group: int) -> int:
    """Pairs a tile: TILE_ROWS rows, fewer where a block has few queries."""
    size = max(1, TILE_ROWS // group)
    while size > 4 and size > pairs_per_block:
        size //= 2
    return size


def attention(
    q: Tensor, keys: Keys, blocks: Tensor, positions: Tensor, plan: Plan, scale: float
) -> tuple[Tensor, Tensor]:
    """One sequence: q [n_q, Hq, D], blocks [Hi, n_q, topk], positions [n_q] -> out like q, float32 lse [n_q, Hq]."""
    if torch.is_grad_enabled() and (q.requires_grad or keys.k.requires_grad or keys.v.requires_grad):
        return _Attention.apply(q, keys.k, keys.v, keys, blocks, positions, plan, scale)
    return _forward(q, keys, blocks, positions, plan, scale)


def _forward(q: Tensor, keys: Keys, blocks: Tensor, positions: Tensor, plan: Plan, scale: float):
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    for rows, strip in _strips(q, blocks, positions, keys, plan, scale):
        group, d = strip.queries.shape[1:]
        wide = strip.queries.dtype
        part = strip.queries.new_zeros(strip.past.total + 1, group, d)
        part_lse = strip.queries.new_full((strip.past.total + 1, group), -INF)
        for tiles, piece, masked in strip.pieces(plan.block_size * wide.itemsize):
            block, head = tiles.block[piece], tiles.head[piece]
            _, scores = strip.scores(tiles, piece, masked, keys.take(keys.k, keys.k_scale, block, head, wide))
            top = scores.amax(-1, keepdim=True)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            partial = torch.bmm(weights, keys.take(keys.v, keys.v_scale, block, head, wide)).div_(total)
            pairs = tiles.pairs[piece].flatten()
            part[pairs] = partial.view(-1, group, d)
            part_lse[pairs] = (top + total.log()).view(-1, group)
        slots = part_lse[:-1].view(len(strip.queries), plan.topk, group)
        whole = slots.logsumexp(1)  # [C * Hkv, G]
        weights = torch.exp(slots - whole.masked_fill(whole == -INF, 0.0)[:, None])
        combined = part[:-1].view(*slots.shape[:2], group, d).mul_(weights[..., None]).sum(1)
        out[rows] = combined.view(-1, *q.shape[1:]).to(q.dtype)
        lse[rows] = whole.view(-1, q.shape[1]).float()
    return out, lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, keys, blocks, positions, plan, scale):
        out, lse = _forward(q, keys, blocks, positions, plan, scale)
        ctx.save_for_backward(q, k, v, blocks, positions, out, lse)
        ctx.count, ctx.plan, ctx.scale = keys.count, plan, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):
        q, k, v, blocks, positions, out, lse = ctx.saved_tensors
        keys, plan = Keys(k, v, None, ctx.count), ctx.plan
        block_size, d = plan.block_size, q.shape[-1]
        dq = torch.empty_like(q)
        dk, dv = None, None
        for rows, strip in _strips(q, blocks, positions, keys, plan, ctx.scale):
            wide, group = strip.queries.dtype, strip.queries.shape[1]
            dk = torch.zeros(k.shape, dtype=wide, device=k.device) if dk is None else dk
            dv = torch.zeros(v.shape, dtype=wide, device=v.device) if dv is None else dv
            above = grad[rows].to(wide).reshape(-1, group, d)
            delta = (above * out[rows].to(wide).reshape(-1, group, d)).sum(-1)
            norm = lse[rows].to(wide).reshape(-1, group)
            part = strip.queries.new_zeros(strip.past.total + 1, group, d)
            for tiles, piece, masked in strip.pieces(2 * block_size * wide.itemsize):
                block, head = tiles.block[piece], tiles.head[piece]
                key = keys.take(k, None, block, head, wide)
                query, scores = strip.scores(tiles, piece, masked, key)
                at = strip.query_of(tiles, piece)
                weights = scores.sub_(norm[at].flatten(1, 2)[..., None]).exp_()
                padding = (tiles.pairs[piece] == tiles.total)[..., None].expand(-1, -1, group).flatten(1, 2)
                weights.masked_fill_(padding[..., None], 0.0)
                up = above[at].flatten(1, 2)  # [tiles, size * G, D]
                slope = torch.bmm(up, keys.take(v, None, block, head, wide).transpose(1, 2))
                slope.sub_(delta[at].flatten(1, 2)[..., None]).mul_(weights)
                part[tiles.pairs[piece].flatten()] = torch.bmm(slope, key).view(-1, group, d)
                where = block * k.shape[1] + head
                dk.view(-1, block_size, d).index_add_(0, where, torch.bmm(slope.transpose(1, 2), query))
                dv.view(-1, block_size, d).index_add_(0, where, torch.bmm(weights.transpose(1, 2), up))
            summed = part[:-1].view(len(strip.queries), plan.topk, group, d).sum(1)
            dq[rows] = (summed * ctx.scale).view(-1, *q.shape[1:]).to(q.dtype)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None
