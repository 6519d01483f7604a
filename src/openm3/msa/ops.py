"""The operator registered with PyTorch, so that `torch.compile(fullgraph=True)` and `torch.export` see four opaque ops:

    openm3::select_blocks    openm3::attention (sparse; dense without blocks)    openm3::index_loss
    openm3::attention_backward: recomputes the attention, and differentiates it

A registered op takes tensors and numbers. A plan goes in as `plan.tensors()`: its lengths are in a tensor on the host,
not in the graph, so that another step's lengths compile nothing anew. Without a compiler nobody comes here: the
functions in `dispatch` are called as they are, and PyTorch's own graph differentiates them.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from openm3.msa import dispatch
from openm3.msa.keys import Scale
from openm3.msa.plan import Plan

_ATTENTION = "Tensor q, Tensor k, Tensor v, Tensor? blocks, Tensor[] plan, float? softmax_scale, Tensor? k_scale, "
_ATTENTION += "Tensor? v_scale, str? backend"


def select_blocks(
    index_q: Tensor, index_k: Tensor, plan: Plan, index_k_scale: Scale, scores: bool, backend: str | None,
    exact: Tensor | None = None, error: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `dispatch.select_blocks`, through the registered op; without `scores` they are empty."""
    args = (index_q.detach(), index_k.detach(), plan.tensors(), plan.topk, _tensor(index_k_scale), scores, backend)
    return torch.ops.openm3.select_blocks(*args, exact, error)


def attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, plan: Plan, softmax_scale: float | None, k_scale: Scale,
    v_scale: Scale, backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `dispatch.attention`, through the registered op."""
    scales = (_tensor(k_scale), _tensor(v_scale))
    return torch.ops.openm3.attention(q, k, v, blocks, plan.tensors(), softmax_scale, *scales, backend)


def index_loss(
    index_q: Tensor, index_k: Tensor, q: Tensor, k: Tensor, blocks: Tensor | None, plan: Plan,
    softmax_scale: float | None, queries: Tensor | None, backend: str | None,
) -> Tensor:  # fmt: skip
    """As `dispatch.index_loss`, through the registered op, which gives the gradients along with the loss."""
    slopes = torch.is_grad_enabled() and (index_q.requires_grad or index_k.requires_grad)
    inputs = [x.detach() for x in (index_q, index_k, q, k)]
    args = (*inputs, blocks, plan.tensors(), softmax_scale, queries, slopes, backend)
    loss, dq, dk = torch.ops.openm3.index_loss(*args)
    if not slopes:
        return loss
    # Adds nothing to the loss, and gives it these gradients.
    return loss + ((index_q - inputs[0]) * dq).sum() + ((index_k - inputs[1]) * dk).sum()


def _tensor(scale: Scale) -> Tensor | None:
    return scale if scale is None or isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float64)


def _scale(scale: Tensor | None) -> Scale:
    """A number that came as a tensor on the host is a number again."""
    return scale.item() if scale is not None and not scale.dim() and scale.device.type == "cpu" else scale


@torch.library.custom_op("openm3::select_blocks", mutates_args=())
def _select_blocks(
    index_q: Tensor, index_k: Tensor, plan: Sequence[Tensor], topk: int, index_k_scale: Tensor | None, scores: bool,
    backend: str | None, exact: Tensor | None = None, error: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    args = (index_q, index_k, Plan.from_tensors(plan), _scale(index_k_scale), scores, backend, exact, error)
    blocks, values = dispatch.select_blocks(*args)
    return blocks.contiguous(), values.contiguous() if scores else index_q.new_empty(0, dtype=torch.float32)


@_select_blocks.register_fake
def _(index_q, index_k, plan, topk, index_k_scale, scores, backend, exact=None, error=None):
    shape = (index_q.shape[1], index_q.shape[0], topk)
    return index_q.new_empty(shape, dtype=torch.int32), index_q.new_empty(shape if scores else 0, dtype=torch.float32)


@torch.library.custom_op("openm3::attention", mutates_args=(), schema=f"({_ATTENTION}) -> (Tensor, Tensor)")
def _attention(q, k, v, blocks, plan, softmax_scale, k_scale, v_scale, backend):
    scales = (_scale(k_scale), _scale(v_scale))
    out, lse = dispatch.attention(q, k, v, blocks, Plan.from_tensors(plan), softmax_scale, *scales, backend)
    return out.contiguous(), lse.contiguous()


@_attention.register_fake
def _(q, k, v, blocks, plan, softmax_scale, k_scale, v_scale, backend):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@contextmanager
def _differentiating() -> Iterator[None]:
    """PyTorch takes differentiation out from under a registered op; this puts it back for what runs inside."""
    keys = torch._C.DispatchKey
    with ExitStack() as stack:
        for key in (keys.AutogradFunctionality, keys.ADInplaceOrView):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield


_GRADS = "(Tensor, Tensor, Tensor)"


@torch.library.custom_op(
    "openm3::attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, {_ATTENTION}) -> {_GRADS}",
)
def _attention_backward(grad_out, q, k, v, blocks, plan, softmax_scale, k_scale, v_scale, backend):
    scales = (_scale(k_scale), _scale(v_scale))
    with _differentiating():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out, _ = dispatch.attention(*inputs, blocks, Plan.from_tensors(plan), softmax_scale, *scales, backend)
        found = torch.autograd.grad(out, inputs, grad_out)
    return tuple(x.contiguous() for x in found)


@_attention_backward.register_fake
def _(grad_out, q, k, v, blocks, plan, softmax_scale, k_scale, v_scale, backend):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    q, k, v, blocks, plan, ctx.softmax_scale, k_scale, v_scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, blocks, k_scale, v_scale, *plan)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_out, _):
    q, k, v, blocks, k_scale, v_scale, *plan = ctx.saved_tensors
    args = (q, k, v, blocks, plan, ctx.softmax_scale, k_scale, v_scale, ctx.backend)
    grads = torch.ops.openm3.attention_backward(grad_out, *args)
    return (*grads, None, [None] * len(plan), None, None, None, None)


_attention.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op(
    "openm3::index_loss",
    mutates_args=(),
    schema="(Tensor index_q, Tensor index_k, Tensor q, Tensor k, Tensor? blocks, Tensor[] plan, float? softmax_scale, "
    f"Tensor? queries, bool slopes, str? backend) -> {_GRADS}",
)
def _index_loss(index_q, index_k, q, k, blocks, plan, softmax_scale, queries, slopes, backend):
    """The loss and, with `slopes`, its gradients of index_q and index_k (else empty)."""
    args = (q, k, blocks, Plan.from_tensors(plan), softmax_scale, queries, backend)
    if not slopes:
        return dispatch.index_loss(index_q, index_k, *args), index_q.new_empty(0), index_k.new_empty(0)
    with _differentiating():
        inputs = [x.detach().requires_grad_() for x in (index_q, index_k)]
        loss = dispatch.index_loss(*inputs, *args)
        dq, dk = torch.autograd.grad(loss, inputs)
    return loss.detach(), dq.contiguous(), dk.contiguous()


@_index_loss.register_fake
def _(index_q, index_k, q, k, blocks, plan, softmax_scale, queries, slopes, backend):
    shapes = (index_q.shape, index_k.shape) if slopes else (0, 0)
    loss = q.new_empty((), dtype=torch.float32)
    return loss, index_q.new_empty(shapes[0]), index_k.new_empty(shapes[1])
