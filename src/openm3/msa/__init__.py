"""MSA, MiniMax Sparse Attention, as an operator on tensors: it knows no model and no engine (report section 3).

    plan = Plan.packed(cu_seqlens, block_size=128, topk=16)
    blocks = select_blocks(index_q, index_k, plan)              # int32 [Hi, T, topk], ascending, -1 last
    out = sparse_attention(q, k, v, blocks, plan)               # [T, Hq, D]

T query tokens travel packed, without a batch axis. Keys lie packed ([N, ...]) or in pages of one block each. Backends:
`reference` is the definition, `torch` runs anywhere in linear memory; `backend=None` takes the best for the device.
Pages must hold finite numbers behind a sequence's last token too (allocate them as zeros).
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from openm3.msa import loss, reference, torch_backend
from openm3.msa.keys import Scale
from openm3.msa.plan import Plan

__all__ = ["BACKENDS", "Plan", "dense_attention", "index_loss", "select_blocks", "sparse_attention"]

BACKENDS = ("reference", "torch")
_log = logging.getLogger(__name__)
_announced: set[str] = set()


def select_blocks(
    index_q: Tensor,
    index_k: Tensor,
    plan: Plan,
    *,
    index_k_scale: Scale = None,
    return_scores: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The top-k blocks of keys for each query and index head; the local and forced ones are always among them.

    index_q [T, Hi, Di]; index_k [N, Di], or pages [P, block, Di]. Returns int32 [Hi, T, topk], ascending, -1 for empty
    slots at the end, and with `return_scores` those blocks' scores, float32 of the same shape (-inf for -1). Ties go to
    the lower block. `index_k_scale` dequantizes fp8 pages: float32 [P], or one number. Not differentiable.
    """
    _check_index(index_q, index_k, plan)
    module = _backend(backend, index_q.device)
    with torch.no_grad():
        if module is reference:
            blocks, scores = reference.select_blocks(index_q, index_k, plan, index_k_scale)
        else:
            blocks, scores = torch_backend.select_blocks(index_q, index_k, plan, index_k_scale, return_scores)
    return (blocks, scores) if return_scores else blocks


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    plan: Plan,
    *,
    softmax_scale: float | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query over the visible keys of its blocks.

    q [T, Hq, D]; k, v [N, Hkv, D], or pages [P, Hkv, block, D]; blocks as `select_blocks` gives them: distinct, -1 for
    none. `softmax_scale` defaults to 1 / sqrt(D). Returns [T, Hq, D] in q's dtype, and with `return_lse` the float32
    log-sum-exp [T, Hq]. Differentiable in q, k, v where the keys are packed. fp8 pages take `k_scale`, `v_scale`:
    float32 [P, Hkv], or one number.
    """
    _check_attention(q, k, v, plan)
    _check_blocks(blocks, q, k, plan)
    module, scale = _backend(backend, q.device), softmax_scale or q.shape[-1] ** -0.5
    attend = reference.attention if module is reference else torch_backend.sparse_attention
    out, lse = attend(q, k, v, blocks, plan, scale, k_scale, v_scale)
    return (out, lse) if return_lse else out


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    softmax_scale: float | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal grouped-query attention over all visible keys: M3's dense layers. Shapes as in `sparse_attention`."""
    _check_attention(q, k, v, plan)
    module, scale = _backend(backend, q.device), softmax_scale or q.shape[-1] ** -0.5
    if module is reference:
        out, lse = reference.attention(q, k, v, None, plan, scale, k_scale, v_scale)
    else:
        out, lse = torch_backend.dense_attention(q, k, v, plan, scale, k_scale, v_scale)
    return (out, lse) if return_lse else out


def index_loss(
    index_q: Tensor,
    index_k: Tensor,
    q: Tensor,
    k: Tensor,
    blocks: Tensor | None,
    plan: Plan,
    *,
    softmax_scale: float | None = None,
    queries: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """KL(stopgrad(P) || P_idx) over the visible tokens of `blocks`, or of the whole prefix for None (dense warm-up).

    Mean over positions and KV groups (report section 3.2); packed keys. `queries` int64 [n] takes the mean over these
    positions of the flat run only, an unbiased estimate at a fraction of the cost. The gradient reaches index_q and
    index_k and nothing else. Returns a float32 scalar.
    """
    _check_index(index_q, index_k, plan)
    _check_attention(q, k, k, plan)
    if plan.page_table is not None:
        raise ValueError("index_loss: the plan's keys are paged; training runs on packed keys")
    if blocks is not None:
        _check_blocks(blocks, q, k, plan)
    scale = softmax_scale or q.shape[-1] ** -0.5
    if _backend(backend, q.device) is reference:
        if queries is not None:
            raise ValueError("index_loss: the reference backend takes the mean over all queries; leave out `queries`")
        return reference.index_loss(index_q, index_k, q, k, blocks, plan, scale)
    return loss.index_loss(index_q, index_k, q, k, blocks, plan, scale, queries)


def _backend(name: str | None, device: torch.device):
    if name is None:
        name = "torch"
        if name not in _announced:
            _announced.add(name)
            _log.info("openm3.msa: backend %s on %s", name, device.type)
    if name not in BACKENDS:
        raise ValueError(f"backend = {name!r}: must be one of {', '.join(BACKENDS)}, or None for the best one")
    return reference if name == "reference" else torch_backend


def _check_index(index_q: Tensor, index_k: Tensor, plan: Plan) -> None:
    if index_q.dim() != 3 or len(index_q) != plan.num_queries:
        raise ValueError(f"index_q: {list(index_q.shape)}, must be [{plan.num_queries}, heads, dim] for this plan")
    _check_keys("index_k", index_k, 2 if plan.page_table is None else 3, plan)
    if index_k.shape[-1] != index_q.shape[-1]:
        raise ValueError(f"index_k: dim {index_k.shape[-1]}, must be index_q's {index_q.shape[-1]}")


def _check_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> None:
    if q.dim() != 3 or len(q) != plan.num_queries:
        raise ValueError(f"q: {list(q.shape)}, must be [{plan.num_queries}, heads, dim] for this plan")
    _check_keys("k", k, 3 if plan.page_table is None else 4, plan)
    if v.shape != k.shape:
        raise ValueError(f"v: {list(v.shape)}, must be k's shape {list(k.shape)}")
    if k.shape[-1] != q.shape[-1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)}: heads must be a multiple of KV heads, and dims equal")


def _check_keys(name: str, x: Tensor, dims: int, plan: Plan) -> None:
    if plan.page_table is None:
        if x.dim() != dims or len(x) != sum(plan.lens_k):
            raise ValueError(
                f"{name}: {list(x.shape)}, must have {dims} axes and {sum(plan.lens_k)} keys for this plan"
            )
    elif x.dim() != dims or x.shape[-2] != plan.block_size:
        raise ValueError(f"{name}: {list(x.shape)}, must have {dims} axes with pages of {plan.block_size} tokens")


def _check_blocks(blocks: Tensor, q: Tensor, k: Tensor, plan: Plan) -> None:
    if blocks.dtype != torch.int32 or blocks.dim() != 3 or blocks.shape[1:] != (len(q), plan.topk):
        raise ValueError(f"blocks: {blocks.dtype} {list(blocks.shape)}, must be int32 [Hi, {len(q)}, {plan.topk}]")
    if k.shape[1] % len(blocks):
        raise ValueError(f"blocks: {len(blocks)} index heads, must divide {k.shape[1]} KV heads")
