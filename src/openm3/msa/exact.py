"""What an exact selection from fp8 index keys is told beside the keys: how far a page's fp8 keys may score from the
keys they stand for. docs/kernels.md has the derivation; `hopper_exact.py` and its host are where the bound is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openm3.msa.dispatch import check_exact, check_scale
from openm3.msa.keys import Scale
from openm3.msa.plan import Plan

ROUNDING = 2.0**-12  # of |q| |k|: what sums in float32 over at most 256 numbers, and bounds held to 16 bits, may be off
LIMIT = 448.0  # the largest number of e4m3
SPARE = 1 + 2.0**-9  # for what the bound's own arithmetic rounds


def index_error(index_k_exact: Tensor, index_k: Tensor, index_k_scale: Scale = None) -> Tensor:
    """`index_k_error` for whole pages: float32 [P], so that |q| times it bounds what their fp8 scores are off by.

    index_k_exact [P, block, Di] and what fp8 made of it, index_k of the same shape, of scale float32 [P] or a number.
    """
    scale = index_k_scale
    if isinstance(scale, Tensor) and scale.dim():
        scale = scale[:, None, None]
    return _errors(index_k_exact, index_k, scale).amax(-1)


def store_index_copy(
    index_k: Tensor, index_k_error: Tensor, index_k_exact: Tensor, plan: Plan, index_k_scale: Scale = None
) -> None:
    """Once this step's tokens are in `index_k_exact`: writes them into the fp8 copy `index_k`, divided by the scale and
    cut at 448, and keeps `index_k_error` up with them. All in place.

    A page begins anew with its first token; later ones only raise its error. Waits for nothing, so that it may be
    captured in a CUDA graph. ValueError for tensors that do not fit each other or the plan.
    """
    slots = plan.slots
    check_exact(index_k, plan, index_k_exact, index_k_error)
    check_scale("index_k_scale", index_k_scale, index_k, index_k.shape[:1])
    pages, inside = slots // plan.block_size, slots % plan.block_size
    exact, scale = index_k_exact[pages, inside], index_k_scale
    if isinstance(scale, Tensor) and scale.dim():
        scale = scale[pages, None]
    stored = exact.float() if scale is None else exact.float() / scale
    stored = stored.clamp(-LIMIT, LIMIT).to(index_k.dtype)
    index_k[pages, inside] = stored
    found = _errors(exact, stored, scale)
    old = torch.where(inside == 0, 0.0, torch.inf).to(found.dtype)
    index_k_error.scatter_reduce_(0, pages, old, "amin").scatter_reduce_(0, pages, found, "amax")


def _errors(exact: Tensor, stored: Tensor, scale: Scale) -> Tensor:
    """float32 [...]: |k - stored * scale| of each key [..., Di], and what sums may be off by, relative to |q|."""
    exact = exact.double()
    stored = stored.double() if scale is None else stored.double() * scale
    return (SPARE * (exact - stored).norm(dim=-1) + ROUNDING * exact.norm(dim=-1)).float()
