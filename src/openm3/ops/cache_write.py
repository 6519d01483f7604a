"""From projections to attention over pages: norm and RoPE of the queries and keys, and the keys' and values' store.

Plain PyTorch rounds where the kernel rounds, to the inputs' dtype after the norm and again after RoPE, so that the two
differ by the order of the norm's sum only. The registered op is openm3::qk_norm_rope_store, which changes the caches.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from openm3.ops.norm_rope import apply_rope, rms_norm

__all__ = ["Scale", "qk_norm_rope_store"]

Scale = Tensor | float | None

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FP8 = torch.float8_e4m3fn
CACHES = (*FLOATS, FP8)
DTYPES = {"cos": (torch.float32,), "sin": (torch.float32,), "slots": (torch.int64,), "k_cache": CACHES,
          "v_cache": CACHES, "index_k_cache": CACHES}  # fmt: skip
ONE_AXIS = ("q_norm", "k_norm", "index_q_norm", "index_k_norm", "slots")
FP8_MAX = 448.0  # what lies beyond is stored as this, not as NaN
BACKENDS = ("triton", "torch")
PREFERRED = {"cuda": "triton"}  # what backend=None takes on a device, where it can serve
TILE = 2048  # values that one program of the kernel takes at a time


class Call(NamedTuple):
    """The arguments of `qk_norm_rope_store` in the order of the registered op, scales as they were given."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_norm: Tensor
    k_norm: Tensor
    cos: Tensor
    sin: Tensor
    k_cache: Tensor
    v_cache: Tensor
    slots: Tensor
    eps: float
    index_q: Tensor | None
    index_k: Tensor | None
    index_q_norm: Tensor | None
    index_k_norm: Tensor | None
    index_k_cache: Tensor | None
    k_scale: Scale
    v_scale: Scale
    index_k_scale: Scale
    backend: str | None = None

    @property
    def scales(self) -> tuple[Scale, Scale, Scale]:
        return self.k_scale, self.v_scale, self.index_k_scale

    @property
    def index(self) -> tuple[Tensor | None, ...]:
        return self.index_q, self.index_k, self.index_q_norm, self.index_k_norm, self.index_k_cache


def qk_norm_rope_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    eps: float,
    index_q: Tensor | None = None,
    index_k: Tensor | None = None,
    index_q_norm: Tensor | None = None,
    index_k_norm: Tensor | None = None,
    index_k_cache: Tensor | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    index_k_scale: Scale = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Normalizes and rotates q, k and the index branch's, and writes k, v and the index keys into their pages.

    q [T, Hq, D], k and v [T, Hkv, D], as the projections gave them (views of one product will do); weights q_norm and
    k_norm [D] of RMSNorm over a head, x * rsqrt(mean(x^2) + eps) * (1 + w) in float32; cos and sin float32
    [T, rotary / 2] turn the first `rotary` channels of a head, channel i with i + rotary / 2. k_cache and v_cache
    [P, Hkv, block, D], any strides with the last axis dense; slots int64 [T] = page * block + offset, distinct; a token
    with a negative slot is not stored. The index branch comes whole or not at all: index_q [T, Hi, Di], index_k
    [T, Di], their norms [Di], index_k_cache [P, block, Di].

    Caches of float8_e4m3fn hold values divided by their scale (a positive number, or a tensor of one on the device) and
    cut at 448. Inputs are bf16, fp16, float32, or float64 (never by the kernel). Returns q and index_q of the same
    shapes and dtypes, the latter None without an index branch.

    No gradient: ValueError where one is wanted, for what does not fit, and for a `backend` ("triton", one launch on a
    GPU, or "torch") that cannot serve the call; None takes the best that can.
    """
    call = Call(
        q, k, v, q_norm, k_norm, cos, sin, k_cache, v_cache, slots, eps, index_q, index_k, index_q_norm, index_k_norm,
        index_k_cache, k_scale, v_scale, index_k_scale, backend,
    )  # fmt: skip
    check(call)
    if torch.compiler.is_compiling():
        scales = (_tensor(scale) for scale in call.scales)
        q, index_q = torch.ops.openm3.qk_norm_rope_store(*call[:-4], *scales, backend)
    else:
        q, index_q = run(call)
    return q, None if index_k is None else index_q


def run(call: Call) -> tuple[Tensor, Tensor]:
    """By the backend asked for or the best one; an empty tensor for index queries that there are not."""
    refusal = _refusal(call)
    if call.backend == "triton" and refusal:
        raise ValueError(f"backend = 'triton': cannot serve this call: {refusal}")
    name = call.backend or ("torch" if refusal else PREFERRED.get(call.q.device.type, "torch"))
    return launched(call) if name == "triton" else plain(call)


# The definition ------------------------------------------------------------------------------------------------------


def plain(call: Call) -> tuple[Tensor, Tensor]:
    """On any device, in PyTorch's own operations. ValueError for slots beyond the caches."""
    index_q, index_k, index_q_norm, index_k_norm, index_k_cache = call.index
    slots, block = call.slots, call.k_cache.shape[2]
    low, high = (int(x) for x in slots.aminmax()) if len(slots) else (0, 0)
    if high >= len(call.k_cache) * block:
        raise ValueError(f"slots: up to {high}, the caches have {len(call.k_cache)} pages of {block} tokens")
    kept = None if low >= 0 else (slots >= 0).nonzero().squeeze(-1)
    slots = slots if kept is None else slots[kept]
    page, offset = slots // block, slots % block

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        return apply_rope(rms_norm(x, weight, call.eps), call.cos, call.sin)

    def stored(x: Tensor, cache: Tensor, scale: Scale) -> Tensor:
        return quantized(x if kept is None else x[kept], cache.dtype, scale)

    call.k_cache[page, :, offset] = stored(turned(call.k, call.k_norm), call.k_cache, call.k_scale)
    call.v_cache[page, :, offset] = stored(call.v, call.v_cache, call.v_scale)
    q = turned(call.q, call.q_norm)
    if index_k is None:
        return q, q.new_empty(0)
    keys = turned(index_k[:, None], index_k_norm).squeeze(1)
    index_k_cache[page, offset] = stored(keys, index_k_cache, call.index_k_scale)
    return q, turned(index_q, index_q_norm)


def quantized(x: Tensor, dtype: torch.dtype, scale: Scale) -> Tensor:
    """As a cache of `dtype` holds it: float8_e4m3fn over its scale, cut at 448."""
    if dtype != FP8:
        return x.to(dtype)
    x = x.float() if scale is None else x.float() / scale
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)


# The kernel ----------------------------------------------------------------------------------------------------------


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """AMD's count as one that has fp8."""
    return (8, 9) if torch.version.hip is not None else torch.cuda.get_device_capability(device)


def _refusal(call: Call) -> str | None:
    """Why the kernel cannot serve these tensors, or None if it can."""
    device = call.q.device
    if device.type != "cuda":
        return f"it needs a GPU, the tensors are on {device.type}"
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'openm3[gpu]'"
    dtypes, capability = {x.dtype for x in call if isinstance(x, Tensor)}, _capability(device)
    least = (8, 9) if FP8 in dtypes else (8, 0)
    if capability < least:
        return "it needs compute capability {}.{} or above, this GPU has {}.{}".format(*least, *capability)
    return "it has no float64" if torch.float64 in dtypes else None


def launched(call: Call) -> tuple[Tensor, Tensor]:
    """One launch, which waits for nothing. Triton is imported here."""
    from openm3.ops import triton_cache_write as kernels

    (tokens, hq, d), hkv, device = call.q.shape, call.k.shape[1], call.q.device
    index_q, index_k, index_q_norm, index_k_norm, index_k_cache = call.index
    indexed, half = index_k is not None, call.cos.shape[-1]
    out = torch.empty(call.q.shape, dtype=call.q.dtype, device=device)
    index_out = out.new_empty(0)
    if not indexed:  # stand for what is never looked at
        index_q, index_k, index_k_cache = call.q[:, :0], call.q[:, 0], call.k_cache[:, 0]
        index_q_norm = index_k_norm = call.q_norm
    else:
        index_out = torch.empty(index_q.shape, dtype=index_q.dtype, device=device)
    hi, di = index_q.shape[1:]
    if not tokens:
        return out, index_out
    widths = (_pad(half), _pad(d - 2 * half), _pad(di - 2 * half))
    rows = max(1, TILE // _pad(max(d, di)))
    tiles = sum(-(-tokens * heads // rows) for heads in (hq, hkv, hkv, *((hi, 1) if indexed else ())))
    numbers, tensors = zip(*(_split(scale, out) for scale in call.scales))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernels.norm_rope_store[(tiles,)](
            call.q, call.k, call.v, index_q, index_k, call.q_norm.contiguous(), call.k_norm.contiguous(),
            index_q_norm.contiguous(), index_k_norm.contiguous(), call.cos.contiguous(), call.sin.contiguous(),
            call.slots.contiguous(), out, index_out, call.k_cache, call.v_cache, index_k_cache, *tensors, *numbers,
            *call.q.stride()[:2], *call.k.stride()[:2], *call.v.stride()[:2], *index_q.stride()[:2], index_k.stride(0),
            *call.k_cache.stride()[:3], *call.v_cache.stride()[:3], *index_k_cache.stride()[:2], tokens, call.eps,
            HQ=hq, HKV=hkv, HI=hi, D=d, DI=di, BLOCK=call.k_cache.shape[2], HALF=half, HALF_PAD=widths[0],
            REST_PAD=widths[1], INDEX_REST_PAD=widths[2], ROWS=rows, INDEXED=indexed, K_SCALED=tensors[0] is not out,
            V_SCALED=tensors[1] is not out, INDEX_SCALED=tensors[2] is not out, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out, index_out


def _pad(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _split(scale: Scale, none: Tensor) -> tuple[float, Tensor]:
    """(number, tensor on the device): one of the two says the scale, the other is 1.0 or `none`."""
    if isinstance(scale, Tensor) and scale.device == none.device:
        return 1.0, scale
    return 1.0 if scale is None else float(scale), none


# The registered op ---------------------------------------------------------------------------------------------------


def _tensor(scale: Scale) -> Tensor | None:
    return scale if scale is None or isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float64)


_SCHEMA = "Tensor q, Tensor k, Tensor v, Tensor q_norm, Tensor k_norm, Tensor cos, Tensor sin, Tensor(a!) k_cache, "
_SCHEMA += "Tensor(b!) v_cache, Tensor slots, float eps, Tensor? index_q, Tensor? index_k, Tensor? index_q_norm, "
_SCHEMA += "Tensor? index_k_norm, Tensor(c!)? index_k_cache, Tensor? k_scale, Tensor? v_scale, Tensor? index_k_scale, "
_SCHEMA += "str? backend"


@torch.library.custom_op(
    "openm3::qk_norm_rope_store",
    mutates_args=("k_cache", "v_cache", "index_k_cache"),
    schema=f"({_SCHEMA}) -> (Tensor, Tensor)",
)
def _op(*args):
    return run(Call(*args))


@_op.register_fake
def _(q, k, v, q_norm, k_norm, cos, sin, k_cache, v_cache, slots, eps, index_q, *index):
    return q.new_empty(q.shape), q.new_empty(0) if index_q is None else index_q.new_empty(index_q.shape)


# What is refused -----------------------------------------------------------------------------------------------------


def check(call: Call) -> None:
    """ValueError, by name and value, for what does not fit together."""
    if call.backend not in (*BACKENDS, None):
        raise ValueError(f"backend = {call.backend!r}: must be one of {', '.join(BACKENDS)}, or None for the best one")
    if call.q.dim() != 3 or not call.q.shape[1]:
        raise ValueError(f"q: {list(call.q.shape)}, must be [T, heads, dim]")
    if call.k.dim() != 3 or not call.k.shape[1]:
        raise ValueError(f"k: {list(call.k.shape)}, must be [T, KV heads, dim]")
    if call.k_cache.dim() != 4:
        raise ValueError(f"k_cache: {list(call.k_cache.shape)}, must be [pages, KV heads, block, dim]")
    (tokens, _, d), hkv, (pages, _, block, _) = call.q.shape, call.k.shape[1], call.k_cache.shape
    half = call.cos.shape[-1]
    shapes = {
        "q": tuple(call.q.shape), "k": (tokens, hkv, d), "v": (tokens, hkv, d), "q_norm": (d,), "k_norm": (d,),
        "cos": (tokens, half), "sin": (tokens, half), "slots": (tokens,), "k_cache": (pages, hkv, block, d),
        "v_cache": (pages, hkv, block, d),
    }  # fmt: skip
    given = [x is not None for x in call.index]
    if any(given) != all(given):
        missing = [name for name, there in zip(Call._fields[11:16], given) if not there]
        raise ValueError(f"{', '.join(missing)}: missing; the index branch comes whole or not at all")
    widths = [d]
    if all(given):
        if call.index_q.dim() != 3 or not call.index_q.shape[1]:
            raise ValueError(f"index_q: {list(call.index_q.shape)}, must be [T, index heads, dim]")
        hi, di = call.index_q.shape[1:]
        widths.append(di)
        shapes |= {
            "index_q": (tokens, hi, di), "index_k": (tokens, di), "index_q_norm": (di,), "index_k_norm": (di,),
            "index_k_cache": (pages, block, di),
        }  # fmt: skip
    tensors, device = call._asdict(), call.q.device
    for name, shape in shapes.items():
        x, dtypes = tensors[name], DTYPES.get(name, FLOATS)
        if x.shape != shape or x.dtype not in dtypes or x.device != device:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(
                f"{name}: {x.dtype} {list(x.shape)} on {x.device}, must be {allowed} {list(shape)} on {device}"
            )
        if name not in ONE_AXIS and x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name}: stride {x.stride(-1)} along its last axis, must be 1")
    if 2 * half > min(widths):
        raise ValueError(f"cos: {half} angles turn {2 * half} channels, more than the {min(widths)} of a head")
    for name in ("k", "v", "index_k"):
        _check_scale(f"{name}_scale", getattr(call, f"{name}_scale"), getattr(call, f"{name}_cache"))
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in call):
        raise ValueError("a gradient is wanted: call it under torch.no_grad(); it has none")


def _check_scale(name: str, scale: Scale, cache: Tensor | None) -> None:
    if scale is None:
        return
    if cache is None or cache.dtype != FP8:
        found = "there is none" if cache is None else f"it is {cache.dtype}"
        raise ValueError(f"{name}: given, but only a cache of float8_e4m3fn takes a scale; {found}")
    if isinstance(scale, Tensor):
        if (
            scale.numel() != 1
            or not scale.dtype.is_floating_point
            or scale.device.type not in ("cpu", cache.device.type)
        ):
            raise ValueError(f"{name}: {scale.dtype} {list(scale.shape)} on {scale.device}, must be one number")
    elif isinstance(scale, bool) or not isinstance(scale, int | float) or not 0.0 < scale < math.inf:
        raise ValueError(f"{name} = {scale!r}: must be a positive number")
