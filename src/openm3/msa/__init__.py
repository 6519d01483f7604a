"""MSA, MiniMax Sparse Attention, as an operator on tensors: it knows no model and no engine (report section 3).

    plan = Plan.packed(cu_seqlens, block_size=128, topk=16)
    blocks = select_blocks(index_q, index_k, plan)              # int32 [Hi, T, topk], ascending, -1 last
    out = sparse_attention(q, k, v, blocks, plan)               # [T, Hq, D]

T query tokens travel packed, without a batch axis. Keys lie packed ([N, ...]) or in pages of one block each. Backends:
`reference` is the definition, `torch` runs anywhere in linear memory, `triton` on GPUs; `backend=None` takes the best
that can serve the call. Under `torch.compile` the functions are registered ops, opaque to the compiler (`ops.py`).
Pages must hold finite numbers behind a sequence's last token too (allocate them as zeros).
"""

from __future__ import annotations

import torch
from torch import Tensor

from openm3.msa import dispatch, ops
from openm3.msa.exact import index_error, store_index_copy
from openm3.msa.keys import Scale
from openm3.msa.plan import Plan

__all__ = [
    "BACKENDS", "Plan", "dense_attention", "index_error", "index_loss", "select_blocks", "sparse_attention",
    "store_index_copy",
]  # fmt: skip

BACKENDS = tuple(dispatch.BACKENDS)


def _way():
    """Compiled code goes through the registered ops; all other calls straight to the backend."""
    return ops if torch.compiler.is_compiling() else dispatch


def select_blocks(
    index_q: Tensor,
    index_k: Tensor,
    plan: Plan,
    *,
    index_k_scale: Scale = None,
    index_k_exact: Tensor | None = None,
    index_k_error: Tensor | None = None,
    return_scores: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The top-k blocks of keys for each query and index head; the local and forced ones are always among them.

    index_q [T, Hi, Di]; index_k [N, Di], or pages [P, block, Di]. Returns int32 [Hi, T, topk], ascending, -1 for empty
    slots at the end, and with `return_scores` those blocks' scores, float32 of the same shape (-inf for -1). Ties go to
    the lower block. `index_k_scale` dequantizes fp8 pages: float32 [P], or one number. Not differentiable.

    fp8 pages alone select approximately: their own scores are ranked. With the keys that they were made of beside them,
    `index_k_exact` of the same shape, the result is what those select; a backend may read the fp8 copy and only those
    exact keys whose blocks may be chosen. `index_k_error` float32 [P] says how far each page may be off: `index_error`
    computes it, `store_index_copy` keeps it up. Scores must be finite then.
    """
    args = (index_q, index_k, plan, index_k_scale, return_scores, backend, index_k_exact, index_k_error)
    blocks, scores = _way().select_blocks(*args)
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
    if blocks is None:
        raise ValueError("blocks: None, must be int32 [Hi, T, topk]; dense_attention attends to all keys")
    args = (q, k, v, blocks, plan, softmax_scale, k_scale, v_scale, backend)
    out, lse = _way().attention(*args)
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
    args = (q, k, v, None, plan, softmax_scale, k_scale, v_scale, backend)
    out, lse = _way().attention(*args)
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
    args = (index_q, index_k, q, k, blocks, plan, softmax_scale, queries, backend)
    return _way().index_loss(*args)
