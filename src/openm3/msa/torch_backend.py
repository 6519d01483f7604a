"""Attention on any device with PyTorch's own ops: memory linear in T + N, differentiable. Which way a plan takes:

one query for each sequence                    in C on a CPU (`cpu_decode.py`), else one batched product (`decode.py`)
many queries on a GPU                          one FlexAttention kernel (`flex.py`)
decoding sequences, then others                the ones as above, the others as below
else, sequence by sequence                     sparse: sorted tiles (`tiles.py`); dense: PyTorch's fused CPU kernel

A sequence whose queries see no more blocks than they may select attends densely, which is the same sum. Consecutive
pages are read in place.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from openm3.msa import cpu_decode, decode, flex, tiles
from openm3.msa.keys import Scale, rows_of, sequence_keys, wide
from openm3.msa.plan import Plan
from openm3.msa.selection import select_blocks

__all__ = ["dense_attention", "select_blocks", "sparse_attention"]

INF = float("inf")
FEW = 16  # query tokens of a sequence up to which it decodes: bound by reading keys, not by products


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, plan: Plan, softmax_scale: float,
    k_scale: Scale = None, v_scale: Scale = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if cpu_decode.fits(q, k, plan) and v.dtype == k.dtype:
        return cpu_decode.attention(q, k, v, blocks, plan, softmax_scale)
    if decode.fits(plan):
        some = None if _all_selected(blocks, plan, slice(None), plan.max_k) else blocks
        return decode.attention(q, k, v, some, plan, softmax_scale, k_scale, v_scale)
    if _use_flex(q, k):
        return flex.attention(q, k, v, blocks, plan, softmax_scale)
    if parts := decode.parts(plan):
        return _join([
            sparse_attention(q[rows], k, v, blocks[:, rows], part, softmax_scale, k_scale, v_scale)
            for rows, part in parts
        ], q)  # fmt: skip
    outs = []
    for s, rows, n in rows_of(plan):
        mine = blocks[:, rows]
        if _all_selected(mine, plan, rows, n) and len(q[rows]) > 1:
            keys, values = sequence_keys(k, plan, s, n, k_scale), sequence_keys(v, plan, s, n, v_scale)
            outs.append(_dense(q[rows], keys, values, plan, rows, softmax_scale))
            continue
        if plan.page_table is None:
            keys, values, ids = _blocked(k, plan, s, n), _blocked(v, plan, s, n), None
        else:
            keys, values, ids = k, v, plan.page_table[s, : -(-n // plan.block_size)].long()
        cache = tiles.Keys(keys, values, ids, -(-n // plan.block_size), k_scale, v_scale)
        outs.append(tiles.attention(q[rows], cache, mine, plan.positions[rows], plan, softmax_scale))
    return _join(outs, q)


def _use_flex(q: Tensor, k: Tensor) -> bool:
    """Whether FlexAttention's kernel can serve: a GPU with Triton, and keys that are not fp8."""
    if not q.is_cuda or q.dtype == torch.float64 or k.dtype.itemsize == 1 or q.shape[-1] < 16:
        return False
    return find_spec("triton") is not None


def _all_selected(blocks: Tensor, plan: Plan, rows: slice, n: int) -> bool:
    """Whether every visible block is selected by every query, so that sparse attention is dense attention."""
    if n > plan.topk * plan.block_size or plan.explicit or blocks.device.type != "cpu":
        return False
    own = plan.positions[rows] // plan.block_size
    return int((blocks >= 0).sum()) == len(blocks) * int((own + 1).sum())


def _blocked(x: Tensor, plan: Plan, s: int, n: int) -> Tensor:
    """Packed keys of sequence s as pages of its own: [blocks, Hkv, block, D], zeros behind the last."""
    x = F.pad(sequence_keys(x, plan, s, n, None), (0, 0, 0, -n % plan.block_size))
    return x.unflatten(1, (-1, plan.block_size)).transpose(0, 1).contiguous()


def _join(outs: list[tuple[Tensor, Tensor]], q: Tensor) -> tuple[Tensor, Tensor]:
    if not outs:
        return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    if len(outs) == 1:
        return outs[0]
    return torch.cat([out for out, _ in outs]), torch.cat([lse for _, lse in outs])


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, softmax_scale: float, k_scale: Scale = None, v_scale: Scale = None
) -> tuple[Tensor, Tensor]:
    if cpu_decode.fits(q, k, plan) and v.dtype == k.dtype:
        return cpu_decode.attention(q, k, v, None, plan, softmax_scale)
    if decode.fits(plan):
        return decode.attention(q, k, v, None, plan, softmax_scale, k_scale, v_scale)
    if _use_flex(q, k):
        return flex.attention(q, k, v, None, plan, softmax_scale)
    if parts := decode.parts(plan):
        return _join([dense_attention(q[rows], k, v, part, softmax_scale, k_scale, v_scale) for rows, part in parts], q)
    outs = []
    for s, rows, n in rows_of(plan):
        keys, values = sequence_keys(k, plan, s, n, k_scale), sequence_keys(v, plan, s, n, v_scale)
        outs.append(_dense(q[rows], keys, values, plan, rows, softmax_scale))
    return _join(outs, q)


def _dense(q: Tensor, k: Tensor, v: Tensor, plan: Plan, rows: slice, scale: float) -> tuple[Tensor, Tensor]:
    """One sequence's causal attention: [n_q, Hq, D] over [Hkv, n, D]; fused where PyTorch has a kernel that fits."""
    n_q, n = len(q), k.shape[1]
    k, v = k.to(q.dtype), v.to(q.dtype)
    cached = n_q < n or plan.explicit
    backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if plan.explicit or q.device.type != "cpu" or q.dtype == torch.float64 or (cached and backward):
        return _dense_masked(q, k, v, plan.positions[rows], scale, plan.workspace_bytes)
    if n_q <= FEW and cached:
        return _dense_decode(q, k, v, scale)
    if cached and q.dtype.itemsize < 4:  # the two parts below would be rounded once before they are merged, and again
        wide = (q.unflatten(1, (len(k), -1)).unbind(1), k[:, None], v[:, None])  # head by head: copies stay small
        parts = [_dense(*(x.float() for x in head), plan, rows, scale) for head in zip(*wide)]
        return torch.cat([out.to(q.dtype) for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 1)
    heads = q.unflatten(1, (len(k), -1)).permute(1, 2, 0, 3)  # [Hkv, G, n_q, D]
    keys, values = (x[:, None, n - n_q :].expand(-1, heads.shape[1], -1, -1) for x in (k, v))  # [Hkv, G, n_q, D]
    out, lse = _flash(heads, keys, values, scale, causal=True)
    if cached:
        # What lies before the chunk is visible to all of its queries: the group's heads become rows of one product.
        old, old_lse = _flash(heads.flatten(1, 2)[:, None], k[:, None, : n - n_q], v[:, None, : n - n_q], scale)
        out, lse = _merge(out, lse, old.view_as(out), old_lse.view_as(lse))
    return out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    """PyTorch's fused CPU kernel, called below `scaled_dot_product_attention` because it also gives the lse."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _merge(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two attentions over disjoint keys, [..., D] with lse [...], as one over all of them."""
    lse = torch.logaddexp(a_lse, b_lse)
    out = a * torch.exp(a_lse - lse)[..., None] + b * torch.exp(b_lse - lse)[..., None]
    return out.to(a.dtype), lse


def _dense_masked(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, workspace: int
) -> tuple[Tensor, Tensor]:
    """The same by strips of queries with an explicit mask: any positions, any device, differentiable."""
    dtype = wide(q)
    strip = max(16, workspace // (16 * q.shape[1] * max(1, k.shape[1])))
    outs = []
    for a in range(0, len(q), strip):
        rows = q[a : a + strip].unflatten(1, (len(k), -1)).permute(1, 2, 0, 3)  # [Hkv, G, C, D]
        scores = (rows.to(dtype).flatten(1, 2) @ k.to(dtype).transpose(1, 2)).unflatten(1, rows.shape[1:3])
        hidden = torch.arange(k.shape[1], device=q.device)[None] > positions[a : a + strip, None]
        scores = (scores * scale).masked_fill(hidden, -INF)
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse.masked_fill(lse == -INF, 0.0)[..., None])
        out = (weights.flatten(1, 2) @ v.to(dtype)).view(rows.shape)
        outs.append((out.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype), lse.permute(2, 0, 1).flatten(1, 2).float()))
    return _join(outs, q)


def _dense_decode(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The last few queries of a sequence over all of its keys, head by head: reads each key and value once.

    Half-precision keys are widened a head at a time: products of theirs in their own dtype would round the scores.
    """
    c, (hkv, n, d) = len(q), k.shape
    out = q.new_empty(c, hkv, q.shape[1] // hkv, d)
    lse = q.new_empty(out.shape[:3], dtype=torch.float32)
    recent = torch.ones(c, c, dtype=torch.bool).triu(1)  # of the last c keys, those after the query
    for r in range(hkv):
        rows = (q.view(c, hkv, -1, d)[:, r].float() * scale).flatten(0, 1)  # [C * G, D]
        scores = (k[r].float() @ rows.T).T.contiguous().view(c, -1, n)  # keys on the left: they are the long side
        scores[:, :, n - c :].masked_fill_(recent[:, None], -INF)
        top = scores.amax(-1, keepdim=True)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        lse[:, r] = (top + total.log()).squeeze(-1)
        out[:, r] = (weights.flatten(0, 1) @ v[r].float()).view(c, -1, d) / total
    return out.flatten(1, 2), lse.flatten(1, 2)
