"""The kernels of `ops`, as the host launches them, compiled for GPUs that are not there."""

from __future__ import annotations

import pytest
import torch
from ops_cases import FP8, Sizes

from openm3.ops import cache_write

triton = pytest.importorskip("triton")

if triton.knobs.runtime.interpret:
    pytest.skip("kernels for the interpreter do not compile", allow_module_level=True)

import triton_targets  # noqa: E402
from openm3.ops import triton_cache_write  # noqa: E402

BF16 = torch.bfloat16
M3 = Sizes(tokens=33, hq=64, hkv=4, hi=4, d=128, di=128, rotary=64, block=128, pages=2, dtype=BF16, cache=BF16)


def launch_of(call, monkeypatch):
    """(positional arguments, named ones) that the kernel would be launched with."""
    launches = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append((args, options))

    with monkeypatch.context() as patch:
        patch.setattr(triton_cache_write, "norm_rope_store", Recorder())
        cache_write.launched(call)
    assert len(launches) == 1
    return launches[0]


def compiled(call, arch, monkeypatch):
    args, options = launch_of(call, monkeypatch)
    return triton_targets.compiled(triton_cache_write.norm_rope_store, args, options, arch)


@pytest.mark.parametrize(
    ("sizes", "arch"),
    [
        (M3, 80),
        (M3.but(cache=FP8, scale=0.5), 90),
        (M3.but(dtype=torch.float16, cache=torch.float32, hi=0), 90),
        (M3, 100),
        (Sizes(d=80, di=20, rotary=12, hi=1), 80),
    ],
)
def test_the_launch_compiles_and_holds_its_values_in_registers(sizes, arch, monkeypatch):
    kernel = compiled(sizes.call(), arch, monkeypatch)
    assert kernel.asm["cubin"]
    assert ".local" not in kernel.asm["ptx"]
    assert kernel.metadata.shared <= 4096  # only what the sum of squares takes across warps
    if sizes.d == 128:  # whole heads travel in wide loads
        assert "ld.global.v4" in kernel.asm["ptx"].replace(".L1::evict_last", "")


def test_fp8_on_the_device_scale_compiles(monkeypatch):
    scales = dict.fromkeys(("k_scale", "v_scale", "index_k_scale"), torch.tensor(0.5))
    assert compiled(M3.but(cache=FP8).call()._replace(**scales), 89, monkeypatch).asm["cubin"]
