"""MSA on any device with PyTorch's own ops: memory linear in T + N, differentiable, one sequence at a time.

Selection scores a strip of queries against pieces of the keys before it and keeps only the block maxima. Attention
turns the loop inside out (report section 4.2), in `tiles.py`. A sequence whose queries see no more blocks than they may
select attends densely through PyTorch's fused kernel, which is the same sum. Consecutive pages are read in place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from openm3.msa import decode, flex, tiles
from openm3.msa.plan import Plan

INF = float("inf")
STRIP = 256  # queries scored at a time
PIECE_BYTES = 8 << 20  # scores held at a time: they stay in a CPU's last-level cache
FEW = 16  # query tokens of a sequence up to which it decodes: bound by reading keys, not by products

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


def _sequence(x: Tensor, plan: Plan, s: int, n: int, scale: Scale) -> Tensor:
    """Keys of sequence s as [Hkv, n, D]: a view of packed keys, and of consecutive pages in a cache that lies by head."""
    if plan.page_table is None:
        start = plan.starts_k()[s]
        return x[start : start + n].transpose(0, 1)
    pages = _pages(x, plan, s, 0, -(-n // plan.block_size), scale)
    return pages.transpose(0, 1).flatten(1, 2)[:, :n]


# ---------------------------------------------------------------------------------------------------------- selection


def select_blocks(
    index_q: Tensor, index_k: Tensor, plan: Plan, index_k_scale: Scale = None, scores: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Without `scores`, queries that see no more blocks than they may select take all of them, unscored."""
    own = plan.positions // plan.block_size
    if decode.fits(plan) and (scores or plan.max_k > plan.topk * plan.block_size):
        return pick_blocks(decode.block_scores(index_q, index_k, plan, index_k_scale), own, plan)
    ids = torch.arange(plan.topk, dtype=torch.int32, device=index_q.device)
    blocks = torch.where(ids <= own[:, None], ids, -1).repeat(index_q.shape[1], 1, 1)
    values = torch.empty(blocks.shape, dtype=torch.float32, device=index_q.device) if scores else None
    strip = STRIP if index_q.device.type == "cpu" else 8 * STRIP
    for s, rows, n in _rows(plan):
        # Rows before the first one that has to choose are done already.
        choosing = 0 if scores or plan.explicit else plan.topk * plan.block_size - (n - (rows.stop - rows.start))
        for a in range(rows.start + max(0, choosing), rows.stop, strip):
            b = min(a + strip, rows.stop)
            positions = plan.positions[a:b]
            visible = n if plan.explicit else n - (rows.stop - b)
            found = _block_maxima(index_q[a:b].to(_wide(index_q)), index_k, plan, s, visible, positions, index_k_scale)
            blocks[:, a:b], chosen = pick_blocks(found, own[a:b], plan)
            if scores:
                values[:, a:b] = chosen
    return blocks, values


def _block_maxima(
    q: Tensor, index_k: Tensor, plan: Plan, s: int, visible: int, positions: Tensor, scale: Scale
) -> Tensor:
    """[C, Hi, Di] queries -> [Hi, C, blocks]: the largest visible score of each block, -inf where none is visible."""
    block, count = plan.block_size, -(-visible // plan.block_size)
    rows = q.transpose(0, 1).flatten(0, 1)  # [Hi * C, Di]
    found = torch.empty(len(rows), count, dtype=rows.dtype, device=rows.device)
    piece = PIECE_BYTES if q.device.type == "cpu" else plan.workspace_bytes // 4
    size = max(1, piece // (4 * block * len(rows)))
    # Blocks before the first query's own are visible as a whole; a device is not asked where that is.
    masked_from = int(positions.min()) // block if positions.device.type == "cpu" else 0
    for a in range(0, count, size):
        b = min(a + size, count)
        keys = _index_keys(index_k, plan, s, a, b, visible, scale).to(rows.dtype)  # [blocks * block, Di]
        scores = (rows @ keys.T).unflatten(1, (b - a, block))
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
    if decode.fits(plan):
        return decode.attention(q, k, v, blocks, plan, softmax_scale, k_scale, v_scale)
    if _use_flex(q, k):
        return flex.attention(q, k, v, blocks, plan, softmax_scale)
    outs = []
    for s, rows, n in _rows(plan):
        mine = blocks[:, rows]
        if _all_selected(mine, plan, rows, n) and len(q[rows]) > 1:
            keys, values = _sequence(k, plan, s, n, k_scale), _sequence(v, plan, s, n, v_scale)
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
    return q.is_cuda and q.dtype != torch.float64 and k.dtype.itemsize > 1 and q.shape[-1] >= 16


def _all_selected(blocks: Tensor, plan: Plan, rows: slice, n: int) -> bool:
    """Whether every visible block is selected by every query, so that sparse attention is dense attention."""
    if n > plan.topk * plan.block_size or plan.explicit or blocks.device.type != "cpu":
        return False
    own = plan.positions[rows] // plan.block_size
    return int((blocks >= 0).sum()) == len(blocks) * int((own + 1).sum())


def _blocked(x: Tensor, plan: Plan, s: int, n: int) -> Tensor:
    """Packed keys of sequence s as pages of its own: [blocks, Hkv, block, D], zeros behind the last."""
    x = F.pad(_sequence(x, plan, s, n, None), (0, 0, 0, -n % plan.block_size))
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
    if decode.fits(plan):
        return decode.attention(q, k, v, None, plan, softmax_scale, k_scale, v_scale)
    if _use_flex(q, k):
        return flex.attention(q, k, v, None, plan, softmax_scale)
    outs = []
    for s, rows, n in _rows(plan):
        keys, values = _sequence(k, plan, s, n, k_scale), _sequence(v, plan, s, n, v_scale)
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
    wide = _wide(q)
    strip = max(16, workspace // (16 * q.shape[1] * max(1, k.shape[1])))
    outs = []
    for a in range(0, len(q), strip):
        rows = q[a : a + strip].unflatten(1, (len(k), -1)).permute(1, 2, 0, 3)  # [Hkv, G, C, D]
        scores = (rows.to(wide).flatten(1, 2) @ k.to(wide).transpose(1, 2)).unflatten(1, rows.shape[1:3])
        hidden = torch.arange(k.shape[1], device=q.device)[None] > positions[a : a + strip, None]
        scores = (scores * scale).masked_fill(hidden, -INF)
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse.masked_fill(lse == -INF, 0.0)[..., None])
        out = (weights.flatten(1, 2) @ v.to(wide)).view(rows.shape)
        outs.append((out.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype), lse.permute(2, 0, 1).flatten(1, 2).float()))
    return _join(outs, q)


def _dense_decode(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The last few queries of a sequence over all of its keys, head by head: reads each key and value once."""
    c, (hkv, n, d) = len(q), k.shape
    out = q.new_empty(c, hkv, q.shape[1] // hkv, d)
    lse = q.new_empty(out.shape[:3], dtype=torch.float32)
    recent = torch.ones(c, c, dtype=torch.bool).triu(1)  # of the last c keys, those after the query
    for r in range(hkv):
        rows = (q.view(c, hkv, -1, d)[:, r] * scale).flatten(0, 1)  # [C * G, D]
        scores = (k[r] @ rows.T).T.float().contiguous().view(c, -1, n)  # keys on the left: they are the long side
        scores[:, :, n - c :].masked_fill_(recent[:, None], -INF)
        lse[:, r] = scores.logsumexp(-1)
        weights = scores.sub_(lse[:, r, :, None]).exp_().flatten(0, 1).to(v.dtype)
        out[:, r] = (weights @ v[r]).view(c, -1, d)
    return out.flatten(1, 2), lse.flatten(1, 2)
