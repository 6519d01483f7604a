"""Decode of several sequences at once: one query each, all in a handful of batched ops and without a host sync."""

from __future__ import annotations

from itertools import takewhile
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from openm3.msa.keys import Scale, dequantize
from openm3.msa.plan import Plan

INF = float("inf")


def fits(plan: Plan) -> bool:
    """Whether a plan is one query for each sequence, over contexts that are near enough in length to be padded."""
    if plan.page_table is None or plan.max_q != 1 or min(plan.lens_q) != 1:
        return False
    if plan.device.type != "cpu":
        return True
    # A CPU reads a long context in place, page after page; only short ones are worth gathering.
    return plan.max_k <= 4096 and plan.max_k * len(plan.lens_k) <= 4 * sum(plan.lens_k)


Part = tuple[slice, Plan]
_parts: WeakKeyDictionary[Plan, tuple[Part, Part] | None] = WeakKeyDictionary()


def parts(plan: Plan) -> tuple[Part, Part] | None:
    """A plan over pages whose first sequences decode while others have more queries, cut in two: (rows, plan) of each.

    Worked out once a plan; None for all others.
    """
    if plan not in _parts:
        n = sum(1 for _ in takewhile(lambda count: count == 1, plan.lens_q))
        cut = plan.page_table is not None and 0 < n < len(plan.lens_q)
        both = ((0, n), (n, len(plan.lens_q))) if cut else ()
        _parts[plan] = tuple((slice(a, plan.starts_q()[b]), plan.sequences(a, b)) for a, b in both) or None
    return _parts[plan]


def _gather(cache: Tensor, pages: Tensor, head: Tensor | None, scale: Scale, wide: torch.dtype) -> Tensor:
    """Pages (of one KV head each, where `head` is given), dequantized."""
    at = pages if head is None else (pages, head)
    return dequantize(_take(cache, pages, head), scale, at).to(wide)


def _take(cache: Tensor, pages: Tensor, head: Tensor | None) -> Tensor:
    """`cache[pages, head]`: copied row by row where a page's head is one piece of memory, several times as fast."""
    if head is None:
        rows = pages
    elif cache.is_contiguous():
        cache, rows = cache.flatten(0, 1), pages * cache.shape[1] + head
    elif cache.transpose(0, 1).is_contiguous():
        cache, rows = cache.transpose(0, 1).flatten(0, 1), head * cache.shape[0] + pages
    else:
        return cache[pages, head]
    return cache.index_select(0, rows.flatten()).unflatten(0, rows.shape)


def block_scores(index_q: Tensor, index_k: Tensor, plan: Plan, scale: Scale) -> Tensor:
    """[B, Hi, Di] queries over pages [P, block, Di] -> [Hi, B, blocks], -inf where no key is visible."""
    width = -(-plan.max_k // plan.block_size)
    wide = torch.float64 if index_q.dtype == torch.float64 else torch.float32
    found = []
    step = max(1, plan.workspace_bytes // (8 * width * plan.block_size * index_q.shape[-1]))
    tokens = torch.arange(width * plan.block_size, device=index_q.device)
    for a in range(0, len(index_q), step):
        keys = _gather(index_k, plan.page_table[a : a + step, :width].long(), None, scale, wide).flatten(1, 2)
        scores = index_q[a : a + step].to(wide) @ keys.transpose(1, 2)  # [b, Hi, width * block]
        scores.masked_fill_((tokens > plan.positions[a : a + step, None])[:, None], -INF)
        found.append(scores.unflatten(-1, (width, -1)).amax(-1))
    return torch.cat(found).transpose(0, 1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, plan: Plan, softmax_scale: float, k_scale: Scale,
    v_scale: Scale,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[B, Hq, D], lse float32 [B, Hq]; blocks int32 [Hi, B, topk], or None for all of the context."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    hkv, block = k.shape[1], plan.block_size
    if blocks is None:
        chosen = torch.arange(-(-plan.max_k // block), device=q.device)[None, None]  # [1, 1, S]
    else:
        chosen = blocks.long().repeat_interleave(hkv // len(blocks), dim=0).transpose(0, 1)  # [B, Hkv, S]
    outs, lses = [], []
    step = max(1, plan.workspace_bytes // (12 * hkv * chosen.shape[-1] * block * q.shape[-1]))
    head = torch.arange(hkv, device=q.device)[:, None]
    for a in range(0, len(q), step):
        table = plan.page_table[a : a + step].long()
        mine = (chosen if blocks is None else chosen[a : a + step]).expand(len(table), hkv, -1)
        pages = table[:, None].expand(-1, hkv, -1).gather(2, mine.clamp_min(0))  # [b, Hkv, S]
        queries = (q[a : a + step].to(wide) * softmax_scale).unflatten(1, (hkv, -1))  # [b, Hkv, G, D]
        scores = queries @ _gather(k, pages, head, k_scale, wide).flatten(2, 3).transpose(2, 3)
        tokens = mine[..., None] * block + torch.arange(block, device=q.device)
        hidden = (mine < 0)[..., None] | (tokens > plan.positions[a : a + step, None, None, None])
        scores = scores.masked_fill_(hidden.flatten(2)[:, :, None], -INF)
        lse = scores.logsumexp(-1)
        weights = scores.sub_(lse.masked_fill(lse == -INF, 0.0)[..., None]).exp_()
        outs.append((weights @ _gather(v, pages, head, v_scale, wide).flatten(2, 3)).flatten(1, 2))
        lses.append(lse.flatten(1, 2))
    return torch.cat(outs).to(q.dtype), torch.cat(lses).float()
