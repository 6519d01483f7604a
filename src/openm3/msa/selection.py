"""Selection with PyTorch's ops: score strips of queries against pieces of the keys before them, keep the block maxima.

Memory is bounded whatever the length. Ties go to the lower block on every path, so that all backends agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from openm3.msa import cpu_decode, decode
from openm3.msa.keys import Scale, pages_of, rows_of, wide
from openm3.msa.plan import Plan, to_device

INF = float("inf")
STRIP = 256  # queries scored at a time on a CPU
PIECE_BYTES = 8 << 20  # scores held at a time on a CPU: they stay in the last-level cache


def select_blocks(
    index_q: Tensor, index_k: Tensor, plan: Plan, index_k_scale: Scale = None, scores: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Without `scores`, queries that see no more blocks than they may select take all of them, unscored."""
    own = plan.positions // plan.block_size
    choosing = scores or plan.max_k > plan.topk * plan.block_size
    if choosing and cpu_decode.fits(index_q, index_k, plan):
        return pick_blocks(cpu_decode.block_scores(index_q, index_k, plan), own, plan)
    if choosing and decode.fits(plan):
        return pick_blocks(decode.block_scores(index_q, index_k, plan, index_k_scale), own, plan)
    if choosing and index_q.device.type == "cpu" and (parts := decode.parts(plan)):
        found = [select_blocks(index_q[rows], index_k, part, index_k_scale, scores) for rows, part in parts]
        blocks, values = zip(*found)
        return torch.cat(blocks, 1), torch.cat(values, 1) if scores else None
    ids = torch.arange(plan.topk, dtype=torch.int32, device=index_q.device)
    blocks = torch.where(ids <= own[:, None], ids, -1).repeat(index_q.shape[1], 1, 1)
    values = torch.empty(blocks.shape, dtype=torch.float32, device=index_q.device) if scores else None
    if index_q.device.type != "cpu" and plan.page_table is None and plan.lens_q == plan.lens_k and not plan.explicit:
        for rows, found in _whole_sequences(index_q, index_k, plan, 0 if scores else plan.topk * plan.block_size):
            blocks[:, rows], chosen = pick_blocks(found, own[rows], plan)
            if scores:
                values[:, rows] = chosen
        return blocks, values
    strip = STRIP if index_q.device.type == "cpu" else 8 * STRIP
    for s, rows, n in rows_of(plan):
        # Rows before the first one that has to choose are done already.
        choosing = 0 if scores or plan.explicit else plan.topk * plan.block_size - (n - (rows.stop - rows.start))
        for a in range(rows.start + max(0, choosing), rows.stop, strip):
            b = min(a + strip, rows.stop)
            positions = plan.positions[a:b]
            visible = n if plan.explicit else n - (rows.stop - b)
            found = _block_maxima(index_q[a:b].to(wide(index_q)), index_k, plan, s, visible, positions, index_k_scale)
            blocks[:, a:b], chosen = pick_blocks(found, own[a:b], plan)
            if scores:
                values[:, a:b] = chosen
    return blocks, values


_groups: WeakKeyDictionary[Plan, dict[int, list[tuple[Tensor, Tensor]]]] = WeakKeyDictionary()


def _by_length(plan: Plan, over: int, heads: int) -> list[tuple[Tensor, Tensor]]:
    """Packed sequences longer than `over`, those of similar length together; worked out once a plan.

    For each group: `at` int64 [S, width], the rows of the flat run (any row behind a sequence's end), and `real` int64
    [C], which of the S * (width - over) queries behind the first `over` exist.
    """
    known = _groups.setdefault(plan, {})
    if over in known:
        return known[over]
    starts, by_width = plan.starts_k(), {}
    for s, n in enumerate(plan.lens_k):
        if n > over:
            by_width.setdefault(max(plan.block_size, 1 << (n - 1).bit_length()), []).append(s)
    known[over] = []
    for members in by_width.values():
        width = -(-max(plan.lens_k[s] for s in members) // plan.block_size) * plan.block_size
        size = max(1, plan.workspace_bytes // (12 * heads * width * width))
        for part in (members[a : a + size] for a in range(0, len(members), size)):
            lens, first = torch.tensor([plan.lens_k[s] for s in part]), torch.tensor([starts[s] for s in part])
            at = (first[:, None] + torch.arange(width)).clamp_max_(starts[-1] - 1)
            real = (torch.arange(over, width) < lens[:, None]).flatten().nonzero().squeeze(-1)
            known[over].append((to_device(at, plan.device), to_device(real, plan.device)))
    return known[over]


def _whole_sequences(index_q: Tensor, index_k: Tensor, plan: Plan, over: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Block scores of the queries behind the first `over` of each packed sequence, in few large launches.

    Yields (rows int64 [C] of the flat run, block scores [Hi, C, blocks]).
    """
    for at, real in _by_length(plan, over, index_q.shape[1]):
        q, k = index_q[at[:, over:]].to(wide(index_q)), index_k[at].to(wide(index_q))  # [S, C, Hi, Di], [S, width, Di]
        scores = q.transpose(1, 2).flatten(1, 2) @ k.transpose(1, 2)
        scores = scores.unflatten(1, (index_q.shape[1], -1))  # [S, Hi, C, width]
        ids = torch.arange(at.shape[1], device=at.device)
        scores.masked_fill_(ids > ids[over:, None], -INF)
        found = scores.unflatten(-1, (-1, plan.block_size)).amax(-1).transpose(0, 1).flatten(1, 2)
        yield at[:, over:].flatten()[real], found[:, real]


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
        return pages_of(index_k, plan, s, a, b, scale).flatten(0, 1)
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
