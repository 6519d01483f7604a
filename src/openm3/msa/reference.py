"""MSA by its definition: plain PyTorch, one sequence at a time, T x N scores in memory, differentiable by autograd.

Every other backend is held against this file (report section 3.1). It computes in float32, or in float64 when given it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from openm3.msa.plan import Plan

INF = float("inf")


def widen(x: Tensor) -> Tensor:
    """To the dtype sums are taken in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def sequence_keys(x: Tensor, plan: Plan, s: int, scale: Tensor | float | None = None) -> Tensor:
    """Keys of sequence s in order: [N, ...] from packed [total, ...], [N, (Hkv,) D] from pages [P, (Hkv,) block, D].

    `scale` dequantizes an fp8 cache: a number, or float32 [P, Hkv] ([P] for index keys), one a page.
    """
    n = plan.lens_k[s]
    if plan.page_table is None:
        start = plan.starts_k()[s]
        return widen(x[start : start + n])
    pages = plan.page_table[s, : -(-n // plan.block_size)].long()
    out = widen(x[pages])
    if scale is not None:
        per_page = scale if not isinstance(scale, Tensor) or scale.dim() == 0 else scale[pages][..., None, None]
        out = out * per_page
    if out.dim() == 4:
        out = out.transpose(1, 2)
    return out.flatten(0, 1)[:n]


def block_scores(index_q: Tensor, index_k: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """[T, Hi, Di] queries, [N, Di] keys -> [Hi, T, blocks]: each block's largest visible score, -inf where none is."""
    n = len(index_k)
    scores = torch.einsum("thd,nd->htn", index_q, index_k)
    future = torch.arange(n, device=index_k.device)[None] > positions[:, None]
    scores = scores.masked_fill(future, -INF)
    scores = torch.nn.functional.pad(scores, (0, -n % block_size), value=-INF)
    return scores.unflatten(-1, (-1, block_size)).amax(-1)


def select_blocks(
    index_q: Tensor, index_k: Tensor, plan: Plan, index_k_scale: Tensor | float | None = None
) -> tuple[Tensor, Tensor]:
    """The contract's `select_blocks`: int32 [Hi, T, topk], ascending, -1 last, and those blocks' scores float32."""
    blocks, scores = [], []
    for s, rows in enumerate(_rows(plan)):
        positions = plan.positions[rows]
        keys = sequence_keys(index_k, plan, s, index_k_scale)
        found = block_scores(widen(index_q[rows]), keys, positions, plan.block_size)
        ids = torch.arange(found.shape[-1], device=found.device)
        own = (positions // plan.block_size)[:, None]
        forced = (ids < plan.init_blocks) | ((ids > own - plan.local_blocks) & (ids <= own))
        rank = found.masked_fill(forced & (ids <= own), INF).masked_fill(found == -INF, -INF)
        order = rank.sort(dim=-1, descending=True, stable=True)  # stable: of equal scores the lower block first
        chosen = order.indices[..., : plan.topk]
        chosen = chosen.masked_fill(order.values[..., : plan.topk] == -INF, len(ids))
        chosen = torch.nn.functional.pad(chosen, (0, plan.topk - chosen.shape[-1]), value=len(ids)).sort(-1).values
        padded = torch.nn.functional.pad(found, (0, 1), value=-INF)
        scores.append(padded.gather(-1, chosen))
        blocks.append(chosen.masked_fill(chosen == len(ids), -1).int())
    return torch.cat(blocks, 1), torch.cat(scores, 1).float()


def selected_mask(blocks: Tensor, positions: Tensor, n: int, block_size: int) -> Tensor:
    """[Hi, T, topk] blocks -> bool [Hi, T, n]: the visible keys of each query's blocks."""
    count = -(-n // block_size)
    safe = blocks.long().masked_fill((blocks < 0) | (blocks >= count), count)
    chosen = torch.zeros(*blocks.shape[:2], count + 1, dtype=torch.bool, device=blocks.device).scatter_(-1, safe, True)
    tokens = chosen[..., :count].repeat_interleave(block_size, dim=-1)[..., :n]
    return tokens & (torch.arange(n, device=blocks.device)[None] <= positions[:, None])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    plan: Plan,
    softmax_scale: float,
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """The contract's `sparse_attention`, or `dense_attention` for blocks None: [T, Hq, D] in q's dtype, lse [T, Hq].

    A query without a visible key gives zeros and an lse of -inf.
    """
    outs, lses = [], []
    for s, rows in enumerate(_rows(plan)):
        positions, n = plan.positions[rows], plan.lens_k[s]
        keys, values = sequence_keys(k, plan, s, k_scale), sequence_keys(v, plan, s, v_scale)
        hkv = keys.shape[1]
        if blocks is None:
            mask = (torch.arange(n, device=q.device)[None] <= positions[:, None])[None]
        else:
            mask = selected_mask(blocks[:, rows], positions, n, plan.block_size)
            mask = mask.repeat_interleave(hkv // len(mask), dim=0)  # [Hkv, T, n]
        queries = widen(q[rows]).unflatten(1, (hkv, -1))
        scores = torch.einsum("trgd,nrd->rgtn", queries, keys) * softmax_scale
        scores = scores.masked_fill(~mask[:, None], -INF)
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse.masked_fill(lse == -INF, 0.0)[..., None])
        out = torch.einsum("rgtn,nrd->trgd", weights, values)
        outs.append(out.flatten(1, 2).to(q.dtype))
        lses.append(lse.permute(2, 0, 1).flatten(1, 2))
    return torch.cat(outs), torch.cat(lses).float()


def index_loss(
    index_q: Tensor, index_k: Tensor, q: Tensor, k: Tensor, blocks: Tensor | None, plan: Plan, softmax_scale: float
) -> Tensor:
    """KL(stopgrad(P) || P_idx) over the visible tokens of the selected blocks (all of them for blocks None).

    P: mean over a group's heads of their softmax; the loss is the mean over positions and groups (report section 3.2).
    """
    total = index_q.new_zeros((), dtype=widen(index_q).dtype)
    for s, rows in enumerate(_rows(plan)):
        positions, n = plan.positions[rows], plan.lens_k[s]
        keys = sequence_keys(k, plan, s)
        hkv = keys.shape[1]
        if blocks is None:
            mask = (torch.arange(n, device=q.device)[None] <= positions[:, None])[None]
        else:
            mask = selected_mask(blocks[:, rows], positions, n, plan.block_size)
            mask = mask.repeat_interleave(hkv // len(mask), dim=0)
        scores = torch.einsum("trgd,nrd->rgtn", widen(q[rows]).unflatten(1, (hkv, -1)), keys) * softmax_scale
        p = scores.masked_fill(~mask[:, None], -INF).softmax(-1).mean(1).detach()  # [Hkv, T, n]
        index = torch.einsum("thd,nd->htn", widen(index_q[rows]), sequence_keys(index_k, plan, s))
        index = index.repeat_interleave(hkv // len(index), dim=0) * index_q.shape[-1] ** -0.5
        log_p_idx = index.masked_fill(~mask, -INF).log_softmax(-1)
        total = total + torch.where(p > 0, p * (p.clamp_min(1e-38).log() - log_p_idx), 0.0).sum()
    groups = k.shape[1]
    return total / max(1, plan.num_queries * groups)


def _rows(plan: Plan) -> list[slice]:
    starts = plan.starts_q()
    return [slice(a, b) for a, b in pairwise(starts)]
