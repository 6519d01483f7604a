"""The index branch's loss: KL between the main branch's attention and the index branch's, over the selected tokens.

`index_loss` in strips of queries: memory is linear in T + N. It is a scalar, so its gradient with respect to the index
queries and keys is taken in the forward pass, strip by strip, and only scaled in the backward pass. Nothing else
receives a gradient: the main branch is the teacher (report section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from openm3.msa.plan import Plan

INF = float("inf")


def index_loss(
    index_q: Tensor, index_k: Tensor, q: Tensor, k: Tensor, blocks: Tensor | None, plan: Plan, softmax_scale: float,
    queries: Tensor | None,
) -> Tensor:  # fmt: skip
    return _IndexLoss.apply(index_q, index_k, q.detach(), k.detach(), blocks, plan, softmax_scale, queries)


class _IndexLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index_q, index_k, q, k, blocks, plan, scale, queries):
        loss = torch.zeros((), dtype=torch.float32, device=q.device)
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dq = torch.zeros(index_q.shape, dtype=torch.float32, device=q.device) if needed else None
        dk = torch.zeros(index_k.shape, dtype=torch.float32, device=q.device) if needed else None
        rows = torch.arange(len(q), device=q.device) if queries is None else queries
        strip = _whole_prefix if blocks is None else _selected_tokens
        width = len(k) * 3 if blocks is None else plan.topk * plan.block_size * k.shape[1] * (q.shape[-1] + 4)
        size = max(1, min(1024, plan.workspace_bytes // (8 * q.shape[1] * width // k.shape[1])))
        weight = 1.0 / max(1, len(rows) * k.shape[1])
        for piece in rows.split(size):
            loss += strip(index_q, index_k, q, k, blocks, plan, scale, piece, dq, dk)
        if needed:
            ctx.save_for_backward(dq.mul_(weight), dk.mul_(weight))
            ctx.dtypes = index_q.dtype, index_k.dtype
        return loss * weight

    @staticmethod
    def backward(ctx, grad):
        dq, dk = ctx.saved_tensors
        return (grad * dq).to(ctx.dtypes[0]), (grad * dk).to(ctx.dtypes[1]), None, None, None, None, None, None


def _whole_prefix(index_q, index_k, q, k, blocks, plan, scale, rows, dq, dk) -> Tensor:
    """The dense warm-up: every key of the same sequence up to the query."""
    hkv, hi = k.shape[1], index_q.shape[1]
    at = torch.arange(len(k), device=q.device)
    seq_of_key = torch.searchsorted(plan.cu_seqlens_k[1:], at, right=True)
    seq, position = plan.seq_ids[rows], plan.positions[rows]
    at = at - plan.cu_seqlens_k[seq_of_key]
    hidden = (seq_of_key[None] != seq[:, None]) | (at[None] > position[:, None])  # [C, N]
    heads = q[rows].unflatten(1, (hkv, -1)).permute(1, 2, 0, 3)  # [Hkv, G, C, D]
    scores = torch.matmul(heads.flatten(1, 2), k.permute(1, 2, 0)).float().unflatten(1, heads.shape[1:3]) * scale
    p = scores.masked_fill_(hidden, -INF).softmax(-1).mean(1)  # [Hkv, C, N]
    queries, keys = index_q[rows].detach().float(), index_k.detach().float()
    index = torch.einsum("chd,nd->hcn", queries, keys) * queries.shape[-1] ** -0.5
    loss, slope = _divergence(p, index.repeat_interleave(hkv // hi, dim=0), hidden)
    if dq is not None:
        slope = slope.unflatten(0, (hi, -1)).sum(1) * queries.shape[-1] ** -0.5  # [Hi, C, N]
        dq.index_add_(0, rows, torch.einsum("hcn,nd->chd", slope, keys))
        dk.add_(torch.einsum("hcn,chd->nd", slope, queries))
    return loss


def _selected_tokens(index_q, index_k, q, k, blocks, plan, scale, rows, dq, dk) -> Tensor:
    """The sparse stage: the visible tokens of each query's selected blocks, gathered."""
    hkv, hi = k.shape[1], index_q.shape[1]
    start, position = plan.cu_seqlens_k[:-1].long()[plan.seq_ids[rows]], plan.positions[rows]
    chosen = blocks[:, rows].long()  # [Hi, C, topk]
    token = chosen[..., None] * plan.block_size + torch.arange(plan.block_size, device=q.device)
    hidden = ((chosen < 0)[..., None] | (token > position[:, None, None])).flatten(2)  # [Hi, C, S]
    where = (token.flatten(2) + start[:, None]).masked_fill_(hidden, 0)
    queries, keys = index_q[rows].detach().float(), index_k.detach()[where].float()  # [C, Hi, Di], [Hi, C, S, Di]
    index = torch.einsum("chd,hcsd->hcs", queries, keys) * queries.shape[-1] ** -0.5
    repeat = hkv // hi
    head = torch.arange(hkv, device=q.device)[:, None, None]
    main_keys = k[where.repeat_interleave(repeat, dim=0), head]  # [Hkv, C, S, D]
    heads = q[rows].unflatten(1, (hkv, -1)).transpose(0, 1)  # [Hkv, C, G, D]
    scores = torch.matmul(heads, main_keys.transpose(-1, -2)).float() * scale  # [Hkv, C, G, S]
    hidden = hidden.repeat_interleave(repeat, dim=0)
    p = scores.masked_fill_(hidden[:, :, None], -INF).softmax(-1).mean(2)
    loss, slope = _divergence(p, index.repeat_interleave(repeat, dim=0), hidden)
    if dq is not None:
        slope = slope.unflatten(0, (hi, -1)).sum(1) * queries.shape[-1] ** -0.5  # [Hi, C, S]
        dq.index_add_(0, rows, torch.einsum("hcs,hcsd->chd", slope, keys))
        dk.index_add_(0, where.flatten(), (slope[..., None] * queries.transpose(0, 1)[:, :, None]).flatten(0, 2))
    return loss


def _divergence(p: Tensor, index: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of KL(P || softmax(index)) over the rows, and its slope P_idx - P with respect to the index scores."""
    log_p_idx = index.masked_fill(hidden, -INF).log_softmax(-1)
    terms = p * (p.clamp_min(1e-38).log() - log_p_idx.masked_fill(hidden, 0.0))
    return terms.sum(), log_p_idx.exp() - p
