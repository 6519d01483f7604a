"""The way of every call: the inputs are looked at once, a backend that can serve is found, and it computes.

A new backend is one more entry of `BACKENDS`: the four functions, and `refusal`, which says why it cannot serve a call.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from openm3.msa import hopper_backend, loss, reference, torch_backend, triton_backend
from openm3.msa.keys import Scale
from openm3.msa.plan import Plan

_log = logging.getLogger(__package__)
_announced: set[tuple[str, str]] = set()
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FP8 = (torch.float8_e4m3fn,)


class Refused(ValueError):
    """The backend asked for cannot serve this call, and `reason` says why."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"backend = {name!r}: cannot serve this call: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Backend:
    """Functions as in `torch_backend` and `loss`, None for one it has not.

    `refusal(queries, keys, plan, values or None)` is None where it can serve these tensors. `select_exactly`: as
    `hopper_backend` has it; without it the exact keys alone are read.
    """

    select_blocks: Callable[..., tuple[Tensor, Tensor | None]]
    sparse_attention: Callable[..., tuple[Tensor, Tensor]]
    dense_attention: Callable[..., tuple[Tensor, Tensor]]
    index_loss: Callable[..., Tensor] | None
    refusal: Callable[[Tensor, Tensor, Plan, Tensor | None], str | None]
    select_exactly: Callable[..., tuple[Tensor, Tensor | None]] | None = None


def _reference_index_loss(index_q, index_k, q, k, blocks, plan, scale, queries) -> Tensor:
    if queries is not None:
        raise ValueError("queries: the reference backend takes the mean over all positions; leave them out")
    return reference.index_loss(index_q, index_k, q, k, blocks, plan, scale)


def _never(*args: object) -> None:
    return None


BACKENDS: dict[str, Backend] = {
    "reference": Backend(
        lambda index_q, index_k, plan, scale, scores: reference.select_blocks(index_q, index_k, plan, scale),
        reference.attention,
        lambda q, k, v, plan, *scales: reference.attention(q, k, v, None, plan, *scales),
        _reference_index_loss,
        _never,
    ),
    "torch": Backend(
        torch_backend.select_blocks, torch_backend.sparse_attention, torch_backend.dense_attention, loss.index_loss,
        _never,
    ),
    "triton": Backend(
        triton_backend.select_blocks, triton_backend.sparse_attention, triton_backend.dense_attention, None,
        triton_backend.refusal,
    ),
    "hopper": Backend(
        hopper_backend.select_blocks, hopper_backend.sparse_attention, hopper_backend.dense_attention, None,
        hopper_backend.refusal, hopper_backend.select_exactly,
    ),
}  # fmt: skip
# What backend=None tries on a device, the best first; then "torch", which serves everything.
PREFERRED: dict[str, tuple[str, ...]] = {"cuda": ("hopper", "triton")}


def function_of(
    name: str | None, function: str, queries: Tensor, keys: Tensor, plan: Plan, values: Tensor | None = None
) -> Callable:
    """The function of `backend_of`."""
    return getattr(backend_of(name, function, queries, keys, plan, values), function)


def backend_of(
    name: str | None, function: str, queries: Tensor, keys: Tensor, plan: Plan, values: Tensor | None = None
) -> Backend:
    """That backend, or the best one for these tensors. ValueError for unknown names and a refusal."""
    if name is None:
        kind = queries.device.type
        better = (n for n in PREFERRED.get(kind, ()) if _refusal(n, function, queries, keys, plan, values) is None)
        name = next(better, "torch")
        if (name, kind) not in _announced:
            _announced.add((name, kind))
            _log.info("openm3.msa: backend %s on %s", name, kind)
    elif name not in BACKENDS:
        raise ValueError(f"backend = {name!r}: must be one of {', '.join(BACKENDS)}, or None for the best one")
    elif reason := _refusal(name, function, queries, keys, plan, values):
        raise Refused(name, reason)
    return BACKENDS[name]


def _refusal(name: str, function: str, queries: Tensor, keys: Tensor, plan: Plan, values: Tensor | None) -> str | None:
    if getattr(BACKENDS[name], function) is None:
        return f"it has no {function}"
    return BACKENDS[name].refusal(queries, keys, plan, values)


def select_blocks(
    index_q: Tensor, index_k: Tensor, plan: Plan, index_k_scale: Scale, scores: bool, backend: str | None,
    exact: Tensor | None = None, error: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """With `exact` and `error`: what the keys `exact` select; a backend may read their fp8 copy `index_k` first."""
    check_index(index_q, index_k, plan)
    check_scale("index_k_scale", index_k_scale, index_k, index_k.shape[:1])
    with torch.no_grad():
        if exact is None and error is None:
            select = function_of(backend, "select_blocks", index_q, index_k, plan)
            return select(index_q, index_k, plan, index_k_scale, scores)
        check_exact(index_k, plan, exact, error)
        taken = backend_of(backend, "select_blocks", index_q, exact, plan)
        if taken.select_exactly is None or taken.refusal(index_q, index_k, plan, None):
            return taken.select_blocks(index_q, exact, plan, None, scores)
        return taken.select_exactly(index_q, index_k, plan, index_k_scale, scores, exact, error)


def attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, plan: Plan, softmax_scale: float | None, k_scale: Scale,
    v_scale: Scale, backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sparse, or dense for blocks None. The lse carries no gradient, whichever backend computed it."""
    check_attention(q, k, v, plan)
    check_scale("k_scale", k_scale, k, k.shape[:2])
    check_scale("v_scale", v_scale, v, v.shape[:2])
    scale = _softmax_scale(softmax_scale, q)
    if blocks is None:
        attend = function_of(backend, "dense_attention", q, k, plan, v)
        out, lse = attend(q, k, v, plan, scale, k_scale, v_scale)
    else:
        _check_blocks(blocks, q, k, plan)
        attend = function_of(backend, "sparse_attention", q, k, plan, v)
        out, lse = attend(q, k, v, blocks, plan, scale, k_scale, v_scale)
    return out, lse.detach()


def index_loss(
    index_q: Tensor, index_k: Tensor, q: Tensor, k: Tensor, blocks: Tensor | None, plan: Plan,
    softmax_scale: float | None, queries: Tensor | None, backend: str | None,
) -> Tensor:  # fmt: skip
    check_index(index_q, index_k, plan)
    check_attention(q, k, k, plan)
    if plan.page_table is not None:
        raise ValueError("plan: its keys are paged; index_loss is for training, and training runs on packed keys")
    if k.shape[1] % index_q.shape[1]:
        raise ValueError(f"index_q: {index_q.shape[1]} index heads, must divide k's {k.shape[1]} KV heads")
    if blocks is not None:
        _check_blocks(blocks, q, k, plan)
    if queries is not None:
        _check_queries(queries, plan)
    scale = _softmax_scale(softmax_scale, q)
    loss_of = function_of(backend, "index_loss", q, k, plan)
    return loss_of(index_q, index_k, q, k, blocks, plan, scale, queries)


def check_index(index_q: Tensor, index_k: Tensor, plan: Plan) -> None:
    """ValueError where the index branch's inputs do not fit the plan or each other."""
    _check_queries_of("index_q", index_q, plan)
    _check_keys("index_k", index_k, 2 if plan.page_table is None else 3, plan)
    if index_k.shape[-1] != index_q.shape[-1]:
        raise ValueError(f"index_k: dim {index_k.shape[-1]}, must be index_q's {index_q.shape[-1]}")


def check_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> None:
    """ValueError where the main branch's inputs do not fit the plan or each other."""
    _check_queries_of("q", q, plan)
    _check_keys("k", k, 3 if plan.page_table is None else 4, plan)
    if v is not k:
        if v.shape != k.shape:
            raise ValueError(f"v: {list(v.shape)}, must be k's shape {list(k.shape)}")
        _check_tensor("v", v, _FLOATS if plan.page_table is None else _FLOATS + _FP8, plan)
    if k.shape[-1] != q.shape[-1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)}: heads must be a multiple of KV heads, and dims equal")


def _check_queries_of(name: str, x: Tensor, plan: Plan) -> None:
    if not isinstance(plan, Plan):
        raise ValueError(f"plan: {type(plan).__name__}, must be a Plan from Plan.packed or Plan.paged")
    if x.dim() != 3 or len(x) != plan.num_queries or not x.shape[1] or not x.shape[2]:
        raise ValueError(f"{name}: {list(x.shape)}, must be [{plan.num_queries}, heads, dim] for this plan")
    _check_tensor(name, x, _FLOATS, plan)


def _check_keys(name: str, x: Tensor, dims: int, plan: Plan) -> None:
    if plan.page_table is None:
        if x.dim() != dims or len(x) != sum(plan.lens_k) or not x.shape[1]:
            raise ValueError(
                f"{name}: {list(x.shape)}, must have {dims} axes and {sum(plan.lens_k)} keys for this plan"
            )
        return _check_tensor(name, x, _FLOATS, plan)
    if x.dim() != dims or x.shape[-2] != plan.block_size or not x.shape[1]:
        raise ValueError(f"{name}: {list(x.shape)}, must have {dims} axes with pages of {plan.block_size} tokens")
    return _check_tensor(name, x, _FLOATS + _FP8, plan)


def _check_tensor(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], plan: Plan) -> None:
    if x.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: {x.dtype}, must be one of {allowed}")
    if x.device != plan.device:
        raise ValueError(f"{name}: on {x.device}, must be on the plan's device {plan.device}")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name}: stride {x.stride(-1)} along its last axis, must be 1; call .contiguous()")


def check_scale(name: str, scale: Scale, cache: Tensor, shape: torch.Size) -> None:
    if scale is None:
        return
    if cache.dtype not in _FP8:
        raise ValueError(f"{name}: given, but the keys are {cache.dtype}; only pages of float8_e4m3fn take a scale")
    if not isinstance(scale, Tensor):
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ValueError(f"{name} = {scale!r}: must be a finite number, or float32 {list(shape)}")
        return
    if scale.dim() and (scale.dtype != torch.float32 or scale.shape != shape):
        raise ValueError(f"{name}: {scale.dtype} {list(scale.shape)}, must be float32 {list(shape)}, or a number")
    if scale.dim() and scale.device != cache.device:
        raise ValueError(f"{name}: on {scale.device}, must be on {cache.device}")


def check_exact(index_k: Tensor, plan: Plan, exact: Tensor | None, error: Tensor | None) -> None:
    if exact is None or error is None:
        given, missing = ("index_k_exact", "index_k_error")[:: 1 if error is None else -1]
        raise ValueError(f"{missing}: None, must be given where {given} is")
    if index_k.dtype not in _FP8:
        raise ValueError(f"index_k_exact: given, but index_k is {index_k.dtype}, must be float8_e4m3fn pages then")
    if exact.shape != index_k.shape:
        raise ValueError(f"index_k_exact: {list(exact.shape)}, must be index_k's shape {list(index_k.shape)}")
    _check_tensor("index_k_exact", exact, _FLOATS, plan)
    if error.dtype != torch.float32 or error.shape != index_k.shape[:1]:
        raise ValueError(
            f"index_k_error: {error.dtype} {list(error.shape)}, must be float32 [{len(index_k)}], one a page"
        )
    _check_tensor("index_k_error", error, (torch.float32,), plan)


def _check_blocks(blocks: Tensor, q: Tensor, k: Tensor, plan: Plan) -> None:
    if blocks.dtype != torch.int32 or blocks.dim() != 3 or blocks.shape[1:] != (len(q), plan.topk):
        raise ValueError(f"blocks: {blocks.dtype} {list(blocks.shape)}, must be int32 [Hi, {len(q)}, {plan.topk}]")
    if not len(blocks) or k.shape[1] % len(blocks):
        raise ValueError(f"blocks: {len(blocks)} index heads, must divide {k.shape[1]} KV heads")
    if blocks.device != plan.device:
        raise ValueError(f"blocks: on {blocks.device}, must be on the plan's device {plan.device}")


def _check_queries(queries: Tensor, plan: Plan) -> None:
    if queries.dtype != torch.int64 or queries.dim() != 1:
        raise ValueError(f"queries: {queries.dtype} {list(queries.shape)}, must be int64 [n]")
    if queries.device != plan.device:
        raise ValueError(f"queries: on {queries.device}, must be on the plan's device {plan.device}")
    if queries.device.type == "cpu" and len(queries):
        low, high = (int(x) for x in queries.aminmax())
        if low < 0 or high >= plan.num_queries:
            raise ValueError(f"queries: from {low} to {high}, must lie within 0..{plan.num_queries - 1}")


def _softmax_scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        return q.shape[-1] ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0.0 < scale < math.inf:
        raise ValueError(f"softmax_scale = {scale!r}: must be a positive number, or None for 1 / sqrt({q.shape[-1]})")
    return float(scale)
