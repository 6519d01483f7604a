"""The Triton backend on a machine without a GPU: its kernels in the interpreter, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from msa_cases import Case

from openm3.msa import triton_backend

HERE = Path(__file__).parent


def test_the_kernels_in_tritons_interpreter():
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "triton_interpreted.py"]
    run = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


def test_tensors_on_a_cpu_are_refused():
    pytest.importorskip("triton")
    tensors, plan = Case((4,), (9,)).tensors(), Case((4,), (9,)).packed()
    reason = triton_backend.refusal(tensors.q, tensors.k, plan, tensors.v)
    assert reason == "it needs a GPU, the tensors are on cpu"


def test_without_triton_the_reason_names_the_extra(monkeypatch):
    monkeypatch.setattr(triton_backend, "_installed", lambda: False)
    tensors, plan = Case((4,), (9,)).tensors(), Case((4,), (9,)).packed()
    assert "openm3[gpu]" in triton_backend.refusal(tensors.index_q, tensors.index_k, plan)


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((8, 0), torch.bfloat16, None),
        ((8, 6), torch.float8_e4m3fn, "8.9"),
        ((8, 9), torch.float8_e4m3fn, None),
        ((7, 5), torch.float16, "8.0"),
    ],
)
def test_what_a_gpu_cannot_do_is_refused(capability, dtype, reason, monkeypatch):
    pytest.importorskip("triton")

    class OnGpu(torch.Tensor):
        device = property(lambda self: torch.device("cuda", 0))
        is_cuda = True

    monkeypatch.setattr(triton_backend, "_capability", lambda device: capability)
    case = Case((4,), (9,), dtype=torch.bfloat16)
    q = case.tensors().q.as_subclass(OnGpu)
    keys = case.tensors().k.to(dtype)
    found = triton_backend.refusal(q, keys, case.packed(), keys)
    assert found is None if reason is None else reason in found
