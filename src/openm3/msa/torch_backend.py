"""MSA on any device with PyTorch's own ops: memory linear in T + N, differentiable, one sequence at a time.

Selection scores a strip of queries against pieces of the keys before it and keeps only the block maxima. Attention turns
the loop inside out (report section 4.2), in `tiles.py`. A sequence whose queries see no more blocks than they may select
attends densely through PyTorch's fused kernel, which is the same sum. Keys in consecutive pages are read in place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from openm3.msa import tiles
from openm3.msa.plan import Plan

INF = float("inf")
STRIP = 256  # queries scored at a time
PIECE_BYTES = 8 << 20  # scores held at a time: they stay in a CPU's last-level cache
FEW = 16  # query tokens of a sequence up to which it decodes: keys are read in place instead of gathered

Scale = Tensor | float | None


def _rows(plan: Plan) -> Iterator[tuple[int, slice, int]]:
    """(sequence, its rows of the flat run, its number of keys), where there are queries."""
    start = 0
    for s, (n_q, n_k) in enumerate(zip(plan.lens_q, plan.lens_k)):
        if n_q:
            yield s, slice(start, start + n_q), n_k
        start += n_q


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _pages(cache: Tensor, plan: Plan, s: int, first: int, last: int, scale: Scale) -> Tensor:
    """Blocks first..last of sequence s as [last - first, ...]: a view where the pages are consecutive."""
    ids = plan.page_table[s, first:last]
    if ids.device.type == "cpu" and bool((ids == torch.arange(int(ids[0]), int(ids[0]) + len(ids))).all()):
        pages = cache[int(ids[0]) : int(ids[0]) + len(ids)]
    else:
        pages = cache[ids.long()]
    return dequantize(pages, scale, ids)


def dequantize(pages: Tensor, scale: Scale, ids: Tensor) -> Tensor:
    """fp8 pages times their scale (one a page and head, one a page, or one number); other dtypes as they are."""
    if pages.dtype.itemsize > 1:
        return pages
    if isinstance(scale, Tensor) and scale.dim():
        return pages.float() * scale[ids.long()][..., None, None]
    return pages.float() if scale is None else pages.float() * scale


def _flat_keys(x: Tensor, plan: Plan, s: int, n: int, scale: Scale) -> Tensor:
    """Keys of sequence s as [n, Hkv, D]."""
    if plan.page_table is None:
        start = plan.starts_k()[s]
        return x[start : start + n]
    pages = _pages(x, plan, s, 0, -(-n // plan.block_size), scale)
    return pages.transpose(1, 2).flatten(0, 1)[:n]


# ---------------------------------------------------------------------------------------------------------- selection


def select_blocks(index_q: Tensor, index_k: Tensor, plan: Plan, index_k_scale: Scale = None) -> tuple[Tensor, Tensor]:
    t, heads, _ = index_q.shape
    blocks = torch.empty(heads, t, plan.topk, dtype=torch.int32, device=index_q.device)
    scores = torch.empty(heads, t, plan.topk, dtype=torch.float32, device=index_q.device)
    for s, rows, n in _rows(plan):
        for a in range(rows.start, rows.stop, STRIP):
            b = min(a + STRIP, rows.stop)
            positions = plan.positions[a:b]
            visible = n if plan.explicit else n - (rows.stop - b)
            found = _block_maxima(index_q[a:b].to(_wide(index_q)), index_k, plan, s, visible, positions, index_k_scale)
            blocks[:, a:b], scores[:, a:b] = pick_blocks(found, positions // plan.block_size, plan)
    return blocks, scores


def _block_maxima(
    q: Tensor, index_k: Tensor, plan: Plan, s: int, visible: int, positions: Tensor, scale: Scale
) -> Tensor:
    """[C, Hi, Di] queries -> [Hi, C, blocks]: the largest visible score of each block, -inf where none is visible."""
    block, count = plan.block_size, -(-visible // plan.block_size)
    rows = q.transpose(0, 1).flatten(0, 1)  # [Hi * C, Di]
    found = torch.empty(len(rows), count, dtype=rows.dtype, device=rows.device)
    size = max(1, PIECE_BYTES // (4 * block * len(rows)))
    # Blocks before the first query's own are visible as a whole; a device is not asked where that is.
    masked_from = int(positions.min()) // block if positions.device.type == "cpu" else 0
    for a in range(0, count, size):
        b = min(a + size, count)
        keys = _index_keys(index_k, plan, s, a, b, visible, scale).to(rows.dtype)  # [blocks * block, Di]
        few = len(rows) <= FEW  # a tall, thin product runs better with the keys on the left
        scores = (keys @ rows.T).T if few else rows @ keys.T
        scores = scores.unflatten(1, (b - a, block))
        if b > masked_from:
            ids = torch.arange(max(a, masked_from) * block, b * block, device=q.device).unflatten(0, (-1, block))
            hidden = ids > positions.repeat(q.shape[1])[:, None, None]
            scores[:, max(a, masked_from) - a :].masked_fill_(hidden, -INF)
        found[:, a:b] = scores.amax(-1)
    return found.unflatten(0, (q.shape[1], -1))


def _index_keys(index_k: Tensor, plan: Plan, s: int, a: int, b: int, visible: int, scale: Scale) -> Tensor:
    """Index keys of blocks a..b as [(b - a) * block, Di]; what lies behind `visible` is masked by its position."""
    if plan.page_table is not None:
        return _pages(index_k, plan, s, a, b, scale).flatten(0, 1)
    start, block = plan.starts_k()[s], plan.block_size
    keys = index_k[start + a * block : start + min(b * block, visible)]
    return F.pad(keys, (0, 0, 0, (b - a) * block - len(keys)))


def pick_blocks(found: Tensor, own: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Block scores [Hi, C, blocks] -> (int32 [Hi, C, topk] ascending with -1 last, their scores); ties: lower block."""
    count = found.shape[-1]
    ids = torch.arange(count, device=found.device)
    seen = ids <= own[:, None]
    k = min(plan.topk, count)
    if count > plan.topk:
        forced = seen & ((ids < plan.init_blocks) | (ids > own[:, None] - plan.local_blocks))
        rank = found.masked_fill(forced, INF)
        bar = rank.topk(k, dim=-1).values[..., -1:]  # the k-th best
        above, level = rank > bar, rank == bar
        room = k - above.sum(-1, keepdim=True)
        chosen = (above | (level & (level.cumsum(-1) <= room))) & seen
    else:
        chosen = seen.expand_as(found)
    order = torch.where(chosen, -ids.float(), -INF)  # the largest are the lowest ids; float32 holds ids below 2**24
    blocks = F.pad(order.topk(k, dim=-1).values.neg(), (0, plan.topk - k), value=INF)
    none = blocks == INF
    safe = blocks.masked_fill(none, 0).long()
    return safe.masked_fill(none, -1).int(), found.gather(-1, safe).masked_fill(none, -INF).float()


# ---------------------------------------------------------------------------------------------------------- attention


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, plan: Plan, softmax_scale: float,
    k_scale: Scale = None, v_scale: Scale = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    outs = []
    for s, rows, n in _rows(plan):
        mine = blocks[:, rows]
        if _all_selected(mine, plan, rows, n) and len(q[rows]) > 1:
            keys, values = _flat_keys(k, plan, s, n, k_scale), _flat_keys(v, plan, s, n, v_scale)
            outs.append(_dense(q[rows], keys, values, plan, rows, softmax_scale))
            continue
        if plan.page_table is None:
            keys, values, ids = _blocked(k, plan, s, n), _blocked(v, plan, s, n), None
        else:
            keys, values, ids = k, v, plan.page_table[s, : -(-n // plan.block_size)].long()
        cache = tiles.Keys(keys, values, ids, -(-n // plan.block_size), k_scale, v_scale)
        outs.append(tiles.attention(q[rows], cache, mine, plan.positions[rows], plan, softmax_scale))
    return _join(outs, q)


def _all_selected(blocks: Tensor, plan: Plan, rows: slice, n: int) -> bool:
    """Whether every visible block is selected by every query, so that sparse attention is dense attention."""
    if n > plan.topk * plan.block_size or plan.explicit or blocks.device.type != "cpu":
        return False
    own = plan.positions[rows] // plan.block_size
    return int((blocks >= 0).sum()) == len(blocks) * int((own + 1).sum())


def _blocked(x: Tensor, plan: Plan, s: int, n: int) -> Tensor:
    """Packed keys of sequence s as pages of its own: [blocks, Hkv, block, D], zeros behind the last."""
    x = F.pad(_flat_keys(x, plan, s, n, None), (0, 0, 0, 0, 0, -n % plan.block_size))
    return x.unflatten(0, (-1, plan.block_size)).transpose(1, 2).contiguous()


def _join(outs: list[tuple[Tensor, Tensor]], q: Tensor) -> tuple[Tensor, Tensor]:
    if not outs:
        return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    if len(outs) == 1:
        return outs[0]
    return torch.cat([out for out, _ in outs]), torch.cat([lse for _, lse in outs])


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, softmax_scale: float, k_scale: Scale = None, v_scale: Scale = None
) -> tuple[Tensor, Tensor]:
    outs = []
    for s, rows, n in _rows(plan):
        if plan.page_table is not None and len(q[rows]) <= FEW:
            outs.append(_dense_decode(q[rows], k, v, plan, s, rows, n, softmax_scale, k_scale, v_scale))
        else:
            keys, values = _flat_keys(k, plan, s, n, k_scale), _flat_keys(v, plan, s, n, v_scale)
            outs.append(_dense(q[rows], keys, values, plan, rows, softmax_scale))
    return _join(outs, q)


def _dense(q: Tensor, k: Tensor, v: Tensor, plan: Plan, rows: slice, scale: float) -> tuple[Tensor, Tensor]:
    """One sequence's causal attention: [n_q, Hq, D] over [n, Hkv, D]; fused where PyTorch has a kernel that fits."""
    n_q, n = len(q), len(k)
    k, v = k.to(q.dtype), v.to(q.dtype)
    if plan.explicit or q.device.type != "cpu" or q.dtype == torch.float64:
        return _dense_masked(q, k, v, plan.positions[rows], scale, plan.workspace_bytes)
    if n_q < n and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _dense_masked(q, k, v, plan.positions[rows], scale, plan.workspace_bytes)
    hkv = k.shape[1]
    heads = q.unflatten(1, (hkv, -1)).permute(1, 2, 0, 3)  # [Hkv, G, n_q, D]
    keys, values = (x.transpose(0, 1)[:, None].expand(-1, heads.shape[1], -1, -1) for x in (k, v))  # [Hkv, G, n, D]
    recent = slice(n - n_q, n)
    out, lse = _flash(heads, keys[:, :, recent], values[:, :, recent], scale, causal=True)
    if n_q < n:
        # What lies before the chunk is visible to all of its queries: the group's heads become rows of one product.
        flat = heads.flatten(1, 2)[:, None]
        old, old_lse = _flash(flat, k[: n - n_q].transpose(0, 1)[:, None], v[: n - n_q].transpose(0, 1)[:, None], scale)
        out, lse = merge(out, lse, old.view_as(out), old_lse.view_as(lse))
    return out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    """PyTorch's fused CPU kernel, called below `scaled_dot_product_attention` because it also gives the lse."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def merge(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two attentions over disjoint keys, [..., D] with lse [...], as one over all of them."""
    lse = torch.logaddexp(a_lse, b_lse)
    out = a * torch.exp(a_lse - lse)[..., None] + b * torch.exp(b_lse - lse)[..., None]
    return out.to(a.dtype), lse


def _dense_masked(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, workspace: int
) -> tuple[Tensor, Tensor]:
    """The same by strips of queries with an explicit mask: any positions, any device, differentiable."""
    hkv = k.shape[1]
    keys, values = k.transpose(0, 1), v.transpose(0, 1)  # [Hkv, n, D]
    strip = max(16, workspace // (16 * q.shape[1] * max(1, len(k))))
    outs = []
    for a in range(0, len(q), strip):
        rows = q[a : a + strip].unflatten(1, (hkv, -1)).permute(1, 2, 0, 3)  # [Hkv, G, C, D]
        scores = (rows.to(_wide(q)).flatten(1, 2) @ keys.to(_wide(q)).transpose(1, 2)).view(*rows.shape[:3], -1)
        hidden = torch.arange(len(k), device=q.device)[None] > positions[a : a + strip, None]
        scores = (scores * scale).masked_fill(hidden, -INF)
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse.masked_fill(lse == -INF, 0.0)[..., None])
        out = (weights.flatten(1, 2) @ values.to(_wide(q))).view(rows.shape)
        outs.append((out.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype), lse.permute(2, 0, 1).flatten(1, 2).float()))
    return _join(outs, q)


def _dense_decode(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, s: int, rows: slice, n: int, scale: float, k_scale: Scale,
    v_scale: Scale,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A few queries over all pages, page by page in place: reads each key and value once and copies none."""
    wide = _wide(q)
    c, hkv = len(q), k.shape[1]
    count = -(-n // plan.block_size)
    heads = (q.to(wide) * scale).unflatten(1, (hkv, -1)).transpose(0, 1).flatten(1, 2)  # [Hkv, C * G, D]
    keys = _pages(k, plan, s, 0, count, k_scale).to(wide)  # [pages, Hkv, block, D]
    scores = torch.matmul(keys, heads.transpose(1, 2))  # [pages, Hkv, block, C * G]
    scores = scores.unflatten(-1, (c, -1))
    ids = torch.arange(count * plan.block_size, device=q.device).view(count, 1, plan.block_size, 1)
    hidden = ids > plan.positions[rows]  # [pages, 1, block, C]
    scores = scores.masked_fill_(hidden[..., None], -INF).flatten(-2)
    lse = scores.logsumexp((0, 2))  # [Hkv, C * G]
    weights = scores.sub_(lse[None, :, None]).exp_()
    values = _pages(v, plan, s, 0, count, v_scale).to(wide)
    out = torch.matmul(weights.transpose(2, 3), values).sum(0)  # [Hkv, C * G, D]
    out = out.unflatten(1, (c, -1)).transpose(0, 1).flatten(1, 2)
    return out.to(q.dtype), lse.unflatten(1, (c, -1)).transpose(0, 1).flatten(1, 2).float()
