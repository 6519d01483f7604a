"""A recorded launch of a Triton kernel, compiled for a GPU that is not there."""

from __future__ import annotations

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv",
         torch.int32: "i32", torch.int64: "i64"}  # fmt: skip


def compiled(kernel, args, options, arch):
    """The kernel for these arguments, specialized as Triton's launcher would. arch: 90 (sm_90) or "gfx942" (AMD)."""
    names, gluon = kernel.arg_names, kernel.is_gluon()
    options = options | {"PDL": True} if "PDL" in names else dict(options)  # as on a GPU
    constants = {name: options.pop(name) for name in names if name in options}
    signature, attributes = {}, {}
    for i, (name, value) in enumerate(zip(names, args)):
        if type(value).__name__ == "TensorDescriptor":
            shape = str(list(value.block_shape)).replace(" ", "")
            layout = f",{value.layout!r}" if gluon else ""
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{shape}{layout}>"
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        special = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if special and not kernel.params[i].do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = (GluonASTSource if gluon else ASTSource)(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    return triton.compile(source, target=target, options=options)
