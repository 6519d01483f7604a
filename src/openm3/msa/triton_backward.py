"""Gradients of attention over packed keys, in Triton. The weights are recomputed from the log-sum-exp, not stored.

dq comes by query, in the forward kernels' order. dk and dv come by tiles of keys: a tile walks the queries that see
it, in ascending order, so that no two programs add to one place and the bits are the same in every run. For sparse
attention these queries are listed by sorting the selection once, on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from openm3.msa import triton_backend as host
from openm3.msa.plan import Plan, to_device
from openm3.msa.triton_attend import entries, listed, load_keys
from openm3.msa.triton_tiles import once, tiles_of

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["tokens", "tile_start"])
def grad_selected(
    q_ptr, k_ptr, v_ptr, up_ptr, out_ptr, lse_ptr, list_ptr, length_ptr, dq_ptr, delta_ptr, tile_seq_ptr, first_ptr,
    count_ptr, positions_ptr, cu_k_ptr, q_token, q_head, k_head, k_token, v_head, v_token, tokens, heads, score_mul,
    softmax_scale, tile_start, GROUP: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK: tl.constexpr, TOPK: tl.constexpr, TOPK_PAD: tl.constexpr, QUERIES: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries and one KV head, over the union of their blocks as in the forward pass; and delta, the
    product of out and its gradient `up`, for the kernel below."""
    tile = tl.program_id(0) + tile_start
    r = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, BM)
    query = rows // GROUP
    real = rows < tl.load(count_ptr + tile) * GROUP
    first = tl.load(first_ptr + tile).to(tl.int64)
    head = r * GROUP + rows % GROUP
    start = tl.load(cu_k_ptr + tl.load(tile_seq_ptr + tile)).to(tl.int64)
    position = tl.load(positions_ptr + first + query, mask=real, other=-1).to(tl.int32)
    last = tl.max(position, 0)
    q, up, lse, delta = _rows(
        q_ptr, up_ptr, out_ptr, lse_ptr, delta_ptr, first + query, head, real, q_token, q_head, heads, D, D_PAD, DOT
    )
    chosen, length = listed(list_ptr, length_ptr, first, r, tokens, QUERIES, SHARE, TOPK, TOPK_PAD)
    end = length * BLOCK
    lane = tl.arange(0, BN)
    d = tl.arange(0, D_PAD)
    dq = tl.zeros([BM, D_PAD], tl.float32)
    for n in range(0, end, BN):
        block, inside, members = entries(chosen, n, end, lane, query, BLOCK, BN, QUERIES)
        key = block * BLOCK + inside
        usable = (key >= 0) & (key <= last)
        visible = members & usable[None] & (key[None] <= position[:, None])
        k = load_keys(k_ptr + r * k_head, (start + key) * k_token, d, usable, D, D_PAD, True, DOT)
        v = load_keys(v_ptr + r * v_head, (start + key) * v_token, d, usable, D, D_PAD, True, DOT)
        dq = _pull(dq, q, up, lse, delta, k, v, visible, score_mul, DOT, PRECISION)
    at = ((first + query) * heads + head)[:, None] * D + d[None]
    dq = (dq * softmax_scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + at, dq, mask=real[:, None] & (d < D)[None])


@triton.jit
def grad_all(
    q_ptr, k_ptr, v_ptr, up_ptr, out_ptr, lse_ptr, dq_ptr, delta_ptr, tile_seq_ptr, first_ptr, count_ptr,
    positions_ptr, cu_k_ptr, q_token, q_head, k_head, k_token, v_head, v_token, heads, score_mul, softmax_scale,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and delta of a tile of queries that attended to all visible keys."""
    tile = tl.program_id(0)
    r = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, BM)
    real = rows < tl.load(count_ptr + tile) * GROUP
    token = tl.load(first_ptr + tile).to(tl.int64) + rows // GROUP
    head = r * GROUP + rows % GROUP
    start = tl.load(cu_k_ptr + tl.load(tile_seq_ptr + tile)).to(tl.int64)
    position = tl.load(positions_ptr + token, mask=real, other=-1).to(tl.int32)
    q, up, lse, delta = _rows(
        q_ptr, up_ptr, out_ptr, lse_ptr, delta_ptr, token, head, real, q_token, q_head, heads, D, D_PAD, DOT
    )
    last = tl.max(position, 0)
    lane = tl.arange(0, BN)
    d = tl.arange(0, D_PAD)
    dq = tl.zeros([BM, D_PAD], tl.float32)
    for n in range(0, last + 1, BN):
        key = n + lane
        k = load_keys(k_ptr + r * k_head, (start + key) * k_token, d, key <= last, D, D_PAD, True, DOT)
        v = load_keys(v_ptr + r * v_head, (start + key) * v_token, d, key <= last, D, D_PAD, True, DOT)
        dq = _pull(dq, q, up, lse, delta, k, v, key[None] <= position[:, None], score_mul, DOT, PRECISION)
    at = (token * heads + head)[:, None] * D + d[None]
    dq = (dq * softmax_scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + at, dq, mask=real[:, None] & (d < D)[None])


@triton.jit
def _rows(
    q_ptr, up_ptr, out_ptr, lse_ptr, delta_ptr, token, head, real, q_token, q_head, heads,
    D: tl.constexpr, D_PAD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Queries and the gradients of their outputs [BM, D_PAD], lse (base 2) and delta [BM]; delta is stored too."""
    d = tl.arange(0, D_PAD)
    inside = real[:, None] & (d < D)[None]
    row = token * heads + head
    q = tl.load(q_ptr + (token * q_token + head * q_head)[:, None] + d[None], mask=inside, other=0.0).to(DOT)
    up = tl.load(up_ptr + row[:, None] * D + d[None], mask=inside, other=0.0)
    out = tl.load(out_ptr + row[:, None] * D + d[None], mask=inside, other=0.0)
    delta = tl.sum(up.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + row, delta, mask=real)
    lse = tl.load(lse_ptr + row, mask=real, other=0.0) * LOG2E
    return q, up.to(DOT), lse, delta


@triton.jit
def _pull(dq, q, up, lse, delta, k, v, visible, score_mul, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """One step of dq: q, up [BM, D_PAD] against k, v [BN, D_PAD]."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score_mul
    p = tl.exp2(tl.where(visible, scores - lse[:, None], -float("inf")))
    slope = p * (tl.dot(up, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(slope.to(DOT), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["users_row", "units"])
def grad_keys(
    q_ptr, k_ptr, v_ptr, up_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, tile_seq_ptr, unit_ptr, key_ptr, end_ptr,
    users_ptr, bounds_ptr, positions_ptr, cu_q_ptr, cu_k_ptr, q_token, q_head, k_head, k_token, v_head, v_token,
    users_row, units, heads, score_mul, softmax_scale,
    GROUP: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, LISTED: tl.constexpr, ASCENDING: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys and one KV head. LISTED: the queries that selected the tile's block, else all of
    its sequence; ASCENDING: these stand in the order of their positions, one apart."""
    tile = tl.program_id(0)
    r = tl.program_id(1).to(tl.int64)
    kv_heads = tl.num_programs(1)
    QUERIES: tl.constexpr = BM // GROUP  # a step's
    seq = tl.load(tile_seq_ptr + tile)
    start = tl.load(cu_k_ptr + seq).to(tl.int64)
    key = tl.load(key_ptr + tile) + tl.arange(0, BN)
    usable = key < tl.load(end_ptr + tile)
    d = tl.arange(0, D_PAD)
    k = load_keys(k_ptr + r * k_head, (start + key) * k_token, d, usable, D, D_PAD, True, DOT)
    v = load_keys(v_ptr + r * v_head, (start + key) * v_token, d, usable, D, D_PAD, True, DOT)
    if LISTED:
        bounds = bounds_ptr + r // SHARE * (units + 1) + tl.load(unit_ptr + tile)
        users = users_ptr + r // SHARE * users_row
        begin = tl.load(bounds).to(tl.int32)
        end = tl.load(bounds + 1).to(tl.int32)
    else:
        begin = tl.load(cu_q_ptr + seq)
        end = tl.load(cu_q_ptr + seq + 1)
        if ASCENDING:
            earliest = tl.load(positions_ptr + begin, mask=begin < end, other=0).to(tl.int32)
            begin += tl.maximum(tl.load(key_ptr + tile) - earliest, 0)
    rows = tl.arange(0, BM)
    dk = tl.zeros([BN, D_PAD], tl.float32)
    dv = tl.zeros([BN, D_PAD], tl.float32)
    for i in range(begin, end, QUERIES):
        nth = i + rows // GROUP
        real = (nth < end) & (rows < QUERIES * GROUP)
        if LISTED:
            token = tl.load(users + nth, mask=real, other=0).to(tl.int64)
        else:
            token = nth.to(tl.int64)
        head = r * GROUP + rows % GROUP
        row = token * heads + head
        inside = real[:, None] & (d < D)[None]
        q = tl.load(q_ptr + (token * q_token + head * q_head)[:, None] + d[None], mask=inside, other=0.0).to(DOT)
        up = tl.load(up_ptr + row[:, None] * D + d[None], mask=inside, other=0.0).to(DOT)
        lse = tl.load(lse_ptr + row, mask=real, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + row, mask=real, other=0.0)
        position = tl.load(positions_ptr + token, mask=real, other=-1).to(tl.int32)
        visible = usable[:, None] & (key[:, None] <= position[None])
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * score_mul  # [BN, BM]
        p = tl.exp2(tl.where(visible, scores - lse[None], -float("inf")))
        dv = tl.dot(p.to(DOT), up, dv, input_precision=PRECISION)
        slope = p * (tl.dot(v, tl.trans(up), input_precision=PRECISION) - delta[None])
        dk = tl.dot(slope.to(DOT), q, dk, input_precision=PRECISION)
    at = ((start + key) * kv_heads + r)[:, None] * D + d[None]
    inside = usable[:, None] & (d < D)[None]
    tl.store(dk_ptr + at, (dk * softmax_scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class KeyTiles:
    """Tiles of neighbouring keys of one sequence, int32 [n] each: keys `key` .. `end`, in unit `unit` of all units.

    A unit is what queries are listed for: a block. `first_unit` int64 [B]: each sequence's first; `units`: how many.
    """

    seq: Tensor
    unit: Tensor
    key: Tensor
    end: Tensor
    first_unit: Tensor
    units: int


def _key_tiles(plan: Plan, unit: int, step: int) -> KeyTiles:
    lens = torch.tensor(plan.lens_k, dtype=torch.int64)
    counts = (lens + unit - 1) // unit
    first, a_unit = counts.cumsum(0) - counts, -(-unit // step)
    seq = torch.repeat_interleave(torch.arange(len(lens)), counts * a_unit)
    of = torch.arange(len(seq)) // a_unit
    within = of - first[seq]
    key = within * unit + torch.arange(len(seq)) % a_unit * step
    end = torch.minimum(torch.minimum(key + step, (within + 1) * unit), lens[seq])
    tables = [to_device(x.int(), plan.device) for x in (seq, of, key, end)]
    return KeyTiles(*tables, first_unit=to_device(first, plan.device), units=int(counts.sum()))


def _users(blocks: Tensor, plan: Plan, tiles: KeyTiles) -> tuple[Tensor, Tensor]:
    """For each index head the queries by the block they selected: int32 [Hi, T * topk], bounds [Hi, units + 1]."""
    seen = (blocks >= 0) & (blocks * plan.block_size <= plan.positions[:, None])
    unit = torch.where(seen, blocks + tiles.first_unit[plan.seq_ids][:, None], tiles.units).flatten(1).int()
    unit, order = unit.sort(dim=1, stable=True)
    ids = torch.arange(tiles.units + 1, dtype=torch.int32, device=blocks.device).expand(len(blocks), -1).contiguous()
    return (order // plan.topk).int(), torch.searchsorted(unit, ids, out_int32=True)


class Attention(torch.autograd.Function):
    """`apply(q, k, v, blocks or None, plan, softmax_scale)` -> out, lse; the lse carries no gradient."""

    @staticmethod
    def forward(ctx, q, k, v, blocks, plan, softmax_scale):
        if blocks is None:
            out, lse = host.dense_attention(q, k, v, plan, softmax_scale)
        else:
            out, lse = host.sparse_attention(q, k, v, blocks, plan, softmax_scale)
        ctx.save_for_backward(q, k, v, blocks, out, lse)
        ctx.plan, ctx.softmax_scale = plan, softmax_scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, up, _):
        q, k, v, blocks, out, lse = ctx.saved_tensors
        with host.on(q.device):
            return *gradients(q, k, v, up, blocks, out, lse, ctx.plan, ctx.softmax_scale), None, None, None


def gradients(
    q: Tensor, k: Tensor, v: Tensor, up: Tensor, blocks: Tensor | None, out: Tensor, lse: Tensor, plan: Plan,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv for `up` [T, Hq, D], the gradient of out. Dense for blocks None."""
    call = host.Call(q, k, v, plan, softmax_scale, None, None)
    q, (tokens, hq, d), hkv, block = call.q, q.shape, k.shape[1], plan.block_size
    group, factor = hq // hkv, softmax_scale * math.log2(math.e)
    up = up.contiguous()
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    delta = torch.empty_like(lse)
    sizes = dict(GROUP=group, D=d, D_PAD=host.pad(d), **call.product, num_stages=2)
    many = 8 if d > 64 else 4
    strides = (q.stride(0), q.stride(1), k.stride(1), k.stride(0), v.stride(1), v.stride(0))
    bm = max(min(host.ROWS[call.small] // 2, host.pad(group * plan.max_q)), host.pad(group))
    size = bm // group
    step = call.step // 2 if d > 128 else call.step
    if blocks is None:
        tiles = tiles_of(plan, size)
        grad_all[(len(tiles), hkv)](
            q, k, v, up, out, lse, dq, delta, tiles.seq, tiles.first, tiles.count, plan.positions, plan.cu_seqlens_k,
            *strides, hq, factor, softmax_scale, BM=bm, BN=step, num_warps=4, **sizes,
        )  # fmt: skip
        of_keys = once(plan, ("keys", step, step), lambda: _key_tiles(plan, step, step))
        users, bounds, share, users_row = delta, delta, 1, 0
    else:
        blocks = blocks.contiguous()
        share = hkv // len(blocks)
        bn = min(step, host.pad(block * plan.topk))
        queries = host.neighbours(plan, group)
        tiles = tiles_of(plan, queries)
        for a, n, lists, lengths in host.unions(blocks, plan, tiles, queries):
            grad_selected[(n, hkv)](
                q, k, v, up, out, lse, lists, lengths, dq, delta, tiles.seq, tiles.first, tiles.count, plan.positions,
                plan.cu_seqlens_k, *strides, tokens, hq, factor, softmax_scale, a, SHARE=share, BLOCK=block,
                TOPK=plan.topk, TOPK_PAD=host.pad(plan.topk, 1), QUERIES=queries, BM=host.pad(queries * group), BN=bn,
                num_warps=4, **sizes,
            )  # fmt: skip
        step = min(step, host.pad(block))
        of_keys = once(plan, ("keys", block, step), lambda: _key_tiles(plan, block, step))
        users, bounds = _users(blocks, plan, of_keys)
        users_row = users.stride(0)
    grad_keys[(len(of_keys.seq), hkv)](
        q, k, v, up, lse, delta, dk, dv, of_keys.seq, of_keys.unit, of_keys.key, of_keys.end, users, bounds,
        plan.positions, plan.cu_seqlens_q, plan.cu_seqlens_k, *strides, users_row, of_keys.units, hq, factor,
        softmax_scale, SHARE=share, BM=bm, BN=step, LISTED=blocks is not None, ASCENDING=not plan.explicit,
        num_warps=many, **sizes,
    )  # fmt: skip
    return dq, dk, dv
