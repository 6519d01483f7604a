"""A recorded launch of a Triton kernel, compiled for a GPU that is not there."""

from __future__ import annotations

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv",
         torch.int32: "i32", torch.int64: "i64"}  # fmt: skip


def compiled(kernel, args, options, arch):
    """The kernel for these arguments, specialized as Triton's launcher would. arch: 90 (sm_90) or "gfx942" (AMD)."""
    names, options = kernel.arg_names, dict(options)
    constants = {name: options.pop(name) for name in names if name in options}
    signature, attributes = {}, {}
    for i, (name, value) in enumerate(zip(names, args)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        special = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if special and not kernel.params[i].do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()}, attributes)
    target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    return triton.compile(source, target=target, options=options)
