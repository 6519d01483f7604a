"""What an exact selection from fp8 index keys is told beside the keys: how far a page's fp8 keys may score from the
keys they stand for. docs/kernels.md has the derivation; `hopper_exact.py` and its host are where the bound is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openm3.msa.keys import Scale
from openm3.msa.plan import Plan

ROUNDING = 2.0**-12  # of |q| |k|: what sums in float32 over at most 256 numbers, and bounds held to 16 bits, may be off
SPARE = 1 + 2.0**-9  # for what the bound's own arithmetic rounds


def index_error(index_k_exact: Tensor, index_k: Tensor, index_k_scale: Scale = None) -> Tensor:
    """`index_k_error` for whole pages: float32 [P], so that |q| times it bounds what their fp8 scores are off by.

    index_k_exact [P, block, Di] and what fp8 made of it, index_k of the same shape, of scale float32 [P] or a number.
    """
    scale = index_k_scale
    if isinstance(scale, Tensor) and scale.dim():
        scale = scale[:, None, None]
    return _errors(index_k_exact, index_k, scale).amax(-1)


def update_index_error(
    index_k_error: Tensor, index_k_exact: Tensor, index_k: Tensor, plan: Plan, index_k_scale: Scale = None
) -> None:
    """Keeps `index_k_error` [P] up with the keys that this step's tokens have written to both caches, in place.

    A page begins anew with its first token; later ones only raise its number. Waits for nothing, so that it may be
    captured in a CUDA graph.
    """
    pages, inside = plan.slots // plan.block_size, plan.slots % plan.block_size
    scale = index_k_scale
    if isinstance(scale, Tensor) and scale.dim():
        scale = scale[pages, None]
    found = _errors(index_k_exact[pages, inside], index_k[pages, inside], scale)
    old = torch.where(inside == 0, 0.0, torch.inf).to(found.dtype)
    index_k_error.scatter_reduce_(0, pages, old, "amin").scatter_reduce_(0, pages, found, "amax")


def _errors(exact: Tensor, stored: Tensor, scale: Scale) -> Tensor:
    """float32 [...]: |k - stored * scale| of each key [..., Di], and what sums may be off by, relative to |q|."""
    exact = exact.double()
    stored = stored.double() if scale is None else stored.double() * scale
    return (SPARE * (exact - stored).norm(dim=-1) + ROUNDING * exact.norm(dim=-1)).float()
