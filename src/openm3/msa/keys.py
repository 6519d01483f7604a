"""Where a plan's keys lie: a sequence's rows, its keys packed or by page, fp8 pages dequantized."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from openm3.msa.plan import Plan

Scale = Tensor | float | None


def rows_of(plan: Plan) -> Iterator[tuple[int, slice, int]]:
    """(sequence, its rows of the flat run, its number of keys), where there are queries."""
    start = 0
    for s, (n_q, n_k) in enumerate(zip(plan.lens_q, plan.lens_k)):
        if n_q:
            yield s, slice(start, start + n_q), n_k
        start += n_q


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def pages_of(cache: Tensor, plan: Plan, s: int, first: int, last: int, scale: Scale) -> Tensor:
    """Blocks first..last of sequence s as [last - first, ...]: a view where the pages are consecutive."""
    ids = plan.page_table[s, first:last]
    if ids.device.type == "cpu" and bool((ids == torch.arange(int(ids[0]), int(ids[0]) + len(ids))).all()):
        pages = cache[int(ids[0]) : int(ids[0]) + len(ids)]
    else:
        pages = cache[ids.long()]
    return dequantize(pages, scale, ids.long())


def dequantize(pages: Tensor, scale: Scale, at: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """`cache[at]`, fp8 times its scale (one for each page and head, one a page, or one number), else as it is.

    `at`: the pages, or pages and heads, that were taken out of the cache.
    """
    if pages.dtype.itemsize > 1:
        return pages
    if isinstance(scale, Tensor) and scale.dim():
        return pages.float() * scale[at][..., None, None]
    return pages.float() if scale is None else pages.float() * scale


def sequence_keys(x: Tensor, plan: Plan, s: int, n: int, scale: Scale) -> Tensor:
    """Keys of sequence s as [Hkv, n, D]: a view of packed keys, and of consecutive pages in a cache by head."""
    if plan.page_table is None:
        start = plan.starts_k()[s]
        return x[start : start + n].transpose(0, 1)
    pages = pages_of(x, plan, s, 0, -(-n // plan.block_size), scale)
    return pages.transpose(0, 1).flatten(1, 2)[:, :n]
