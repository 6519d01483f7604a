"""The kernels compile under the Triton of the oldest supported PyTorch too; every other test takes the newest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OLDEST = Path(sys.prefix) / "triton-oldest"  # the Makefile installs it there
FILES = ["msa/test_msa_triton_compile.py", "msa/test_msa_hopper.py", "ops/test_ops_triton_compile.py"]
# One shape for each of sm_80, sm_90 and sm_100, and every Hopper kernel.
CASES = "case0-80 or case1-90 or case2-100 or one-False or score_of_a_prompt or attention_of_a_prompt or the_launch"


@pytest.mark.skipif(not OLDEST.exists(), reason="needs an older Triton beside the environment: `make test` installs it")
def test_the_kernels_compile_under_the_oldest_triton():
    code = "import sys, triton, pytest; print('triton', triton.__version__); sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "-p", "no:cacheprovider", "--tb=short", "-k", CASES, *FILES]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(OLDEST), *sys.path]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "triton 3.6.0" in run.stdout
    assert " 0 passed" not in run.stdout
    print(run.stdout.splitlines()[-1])
