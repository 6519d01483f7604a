"""Each Triton kernel, as the host launches it, compiled for GPUs that are not there; and whether it fits a 4090."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from msa_cases import Case

from openm3.msa import triton_backend

triton = pytest.importorskip("triton")

if triton.knobs.runtime.interpret:
    pytest.skip("kernels for the interpreter do not compile", allow_module_level=True)

import triton_targets  # noqa: E402
from openm3.msa import triton_attend, triton_backward, triton_select  # noqa: E402

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}  # KB that one program may use
CUDA = [arch for arch in SHARED if isinstance(arch, int)]
M3 = Case((4096,), (16384,), hkv=1, group=16, hi=4, d=128, di=128, block=128, topk=16, dtype=torch.bfloat16)
NANO = M3.but(hkv=2, group=4, hi=2, d=64, di=64, block=64, topk=8)


class Recorder:
    """Stands where a kernel stands and keeps what it is launched with."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


@contextmanager
def recorded(monkeypatch, arch):
    with monkeypatch.context() as patch:
        patch.setattr(triton_backend, "_capability", lambda device: (arch // 10, arch % 10) if arch in CUDA else (8, 9))
        patch.setattr(triton_backend, "_shared_memory", lambda device: SHARED[arch] << 10)
        patch.setattr(triton_backend, "_multiprocessors", lambda device: 132)
        launches = []
        for module, name in KERNELS:
            recorder = Recorder(getattr(module, name))
            recorder.launches = launches
            patch.setattr(module, name, recorder)
        yield launches


KERNELS = [
    (triton_select, "score_blocks"), (triton_select, "pick_blocks"), (triton_attend, "attend_selected"),
    (triton_attend, "unite_blocks"), (triton_attend, "attend_all"), (triton_attend, "combine"),
    (triton_backward, "grad_selected"), (triton_backward, "grad_all"), (triton_backward, "grad_keys"),
]  # fmt: skip


def launches_of(case, monkeypatch, arch, fp8=False, paged=False, gradients=False):
    tensors, plan = case.tensors(), case.packed()
    scale = None
    if paged:
        tensors, plan = tensors.in_pages(), case.paged()
    index_k, k, v = tensors.index_k, tensors.k, tensors.v
    if fp8:
        index_k, k, v = (x.to(torch.float8_e4m3fn) for x in (index_k, k, v))
        scale = torch.ones(len(k), case.hkv)
    with recorded(monkeypatch, arch) as launches:
        index_scale = None if scale is None else scale[:, 0].contiguous()
        blocks, _ = triton_backend.select_blocks(tensors.index_q, index_k, plan, index_scale)
        q = tensors.q.requires_grad_(gradients)
        for out, _ in (
            triton_backend.sparse_attention(q, k, v, blocks, plan, 0.1, scale, scale),
            triton_backend.dense_attention(q, k, v, plan, 0.1, scale, scale),
        ):
            if gradients:
                out.sum().backward()
    return launches


LONG = pytest.mark.soak


@pytest.mark.parametrize(
    ("case", "arch", "more"),
    [
        (M3, 80, {"gradients": True}),
        (M3, 90, {}),
        (M3, 100, {}),
        (M3, 89, {"paged": True, "fp8": True}),
        (M3.but(lens_q=(1,)), 90, {"paged": True, "fp8": True}),
        (NANO.but(dtype=torch.float16), 86, {}),
        (NANO, "gfx942", {}),
        pytest.param(M3, "gfx942", {"gradients": True}, marks=LONG),
        pytest.param(M3, "gfx942", {"paged": True, "fp8": True}, marks=LONG),
        pytest.param(M3, 89, {"gradients": True}, marks=LONG),
        pytest.param(M3, 90, {"gradients": True}, marks=LONG),
        pytest.param(M3, 100, {"gradients": True}, marks=LONG),
        pytest.param(M3, 120, {"gradients": True}, marks=LONG),
        pytest.param(M3.but(lens_q=(1,)), 80, {"paged": True}, marks=LONG),
        pytest.param(NANO.but(dtype=torch.float16), 80, {"gradients": True}, marks=LONG),
        pytest.param(NANO.but(dtype=torch.float16, lens_q=(4,)), 100, {"paged": True, "fp8": True}, marks=LONG),
        pytest.param(NANO.but(dtype=torch.float32), 86, {"gradients": True}, marks=LONG),
        pytest.param(M3.but(d=80, di=96, block=48), 80, {"paged": True}, marks=LONG),
        pytest.param(M3.but(d=256, di=256, block=256), 89, {"gradients": True}, marks=LONG),
        pytest.param(M3.but(d=96, block=16, topk=64, group=32), 90, {"gradients": True}, marks=LONG),
    ],
    ids=lambda x: str(x) if isinstance(x, (int, str)) else None,
)
def test_every_launch_compiles_and_fits(case, arch, more, monkeypatch):
    launches = launches_of(case, monkeypatch, arch, **more)
    assert len(launches) >= (8 if more.get("gradients") else 4)
    for launch in launches:
        kernel = triton_targets.compiled(*launch, arch)
        assert kernel.metadata.shared <= SHARED[arch] << 10, launch[0].__name__
        assert kernel.asm["cubin" if arch in CUDA else "hsaco"]
