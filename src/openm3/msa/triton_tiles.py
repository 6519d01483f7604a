"""Which queries a program takes: tiles of neighbours, and strips of tiles. Worked out once a plan, from what the host
knows of it, without waiting for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from openm3.msa.plan import Plan, to_device

T = TypeVar("T")

_known: WeakKeyDictionary[Plan, dict] = WeakKeyDictionary()


def once(plan: Plan, key: tuple, build: Callable[[], T]) -> T:
    known = _known.setdefault(plan, {})
    if key not in known:
        known[key] = build()
    return known[key]


@dataclass(frozen=True)
class Tiles:
    """Tiles of neighbouring queries of one sequence: int32 [n] each. `first` counts in the flat run."""

    seq: Tensor
    first: Tensor
    count: Tensor

    def __len__(self) -> int:
        return len(self.seq)


def _tiles(plan: Plan, size: int, skip: Tensor | None = None) -> tuple[Tiles, Tensor]:
    """Tiles of `size` queries on the host, and how many keys each may see at most; `skip` [B] leading queries left out.

    The longest come first within a sequence: they take the longest.
    """
    lens_q, lens_k = torch.tensor(plan.lens_q, dtype=torch.int64), torch.tensor(plan.lens_k, dtype=torch.int64)
    skip = torch.zeros_like(lens_q) if skip is None else skip
    counts = (lens_q - skip + size - 1) // size
    seq = torch.repeat_interleave(torch.arange(len(lens_q)), counts).flip(0)
    nth = torch.arange(len(seq)).flip(0) - (counts.cumsum(0) - counts)[seq]
    offset = skip[seq] + nth * size
    count = (lens_q[seq] - offset).clamp_max(size)
    seen = lens_k[seq] if plan.explicit else (lens_k - lens_q)[seq] + offset + count
    first = torch.tensor(plan.starts_q(), dtype=torch.int64)[seq] + offset
    return Tiles(seq.int(), first.int(), count.int()), seen


def _moved(tiles: Tiles, device: torch.device) -> Tiles:
    return Tiles(*(to_device(x, device) for x in (tiles.seq, tiles.first, tiles.count)))


def tiles_of(plan: Plan, size: int) -> Tiles:
    """Tiles of all queries, on the plan's device; worked out once a plan."""
    return once(plan, ("tiles", size), lambda: _moved(_tiles(plan, size)[0], plan.device))


@dataclass(frozen=True)
class Strips:
    """Tiles of queries that have to choose, and where their block scores lie.

    `base` int64, `width` int32 [n]: a tile's scores start at `base` of the workspace, rows of `width` blocks. `cuts`:
    (first tile, last tile + 1, widest row) of each strip; `size`: scores of the largest strip; `rows` of a full tile.
    """

    tiles: Tiles
    base: Tensor
    width: Tensor
    cuts: list[tuple[int, int, int]]
    size: int
    rows: int
    covers_all: bool


def strips_of(plan: Plan, heads: int, most_rows: int, scores: bool) -> Strips:
    """Strips whose scores fit the plan's workspace, of tiles of at most `most_rows` rows; once a plan."""
    return once(plan, ("strips", heads, most_rows, scores), lambda: _strips(plan, heads, most_rows, scores))


def _strips(plan: Plan, heads: int, most_rows: int, scores: bool) -> Strips:
    lens_q, lens_k = torch.tensor(plan.lens_q, dtype=torch.int64), torch.tensor(plan.lens_k, dtype=torch.int64)
    free = plan.topk * plan.block_size  # who sees no more keys takes all blocks, unscored
    if scores:
        skip = torch.zeros_like(lens_q)
    elif plan.explicit:
        skip = torch.where(lens_k <= free, lens_q, 0)
    else:
        skip = (free - (lens_k - lens_q)).clamp_min(0).minimum(lens_q)
    limit = plan.workspace_bytes // 4
    widest = max(1, -(-plan.max_k // plan.block_size))
    size = max(1, min(most_rows // heads, plan.max_q, limit // (heads * widest)))
    tiles, seen = _tiles(plan, size, skip)
    width = (seen + plan.block_size - 1) // plan.block_size
    cost = tiles.count.long() * heads * width
    ends = cost.cumsum(0)
    base, cuts, largest, a = ends - cost, [], 0, 0
    while a < len(tiles):
        before = int(ends[a] - cost[a])
        b = max(a + 1, int(torch.searchsorted(ends, before + limit, right=True)))
        cuts.append((a, b, int(width[a:b].max())))
        largest = max(largest, int(ends[b - 1]) - before)
        base[a:b] -= before
        a = b
    return Strips(
        tiles=_moved(tiles, plan.device), base=to_device(base, plan.device), width=to_device(width.int(), plan.device),
        cuts=cuts, size=largest, rows=size * heads, covers_all=not bool(skip.any()),
    )  # fmt: skip
