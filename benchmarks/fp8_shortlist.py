"""Claim: an exact selection from fp8 index keys reads few of the exact keys, the fewer the longer the context.

The Hopper backend's decode kernels scan fp8 keys (a scale a page) and list the blocks whose exact keys may matter; this
counts them, for one query of M3's four index heads. Random data agree on nothing, in clustered data the index heads ask
for a few common blocks (`msa_sides.py`). Without a GPU the kernels run in Triton's interpreter, which counts the same.

    python benchmarks/fp8_shortlist.py                       # about 5 minutes on a CPU
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import replace
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from msa_sides import Geometry, make_case, quantized

from openm3.msa import hopper_backend, hopper_exact, select_blocks

K, M = 1 << 10, 1 << 20
LIGHT = Geometry(heads=16, kv_heads=1)  # keys and values are not read here


def listed(context: int, data: str, seed: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks each index head lists, int32 [4]; and which blocks, bool [4, blocks]."""
    # float16, because the interpreter multiplies no bfloat16.
    case, kernel, seen = (
        make_case(LIGHT, device, torch.float16, 1, context, 1, data, seed),
        hopper_exact.rescore_step,
        [],
    )

    class Watched:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append(args) or kernel[grid](*args, **options)

    hopper_exact.rescore_step = Watched()
    try:
        keys = quantized(case.index_k)
        found = select_blocks(case.index_q, plan=case.plan, backend="hopper", **keys)
    finally:
        hopper_exact.rescore_step = kernel
    if context <= 128 * K:  # and it is the exact keys' selection
        assert torch.equal(found, select_blocks(case.index_q, case.index_k, case.plan, backend="hopper"))
    (args,) = seen
    blocks, lengths = args[2][0, :4], args[3][0, :4]
    real = torch.arange(blocks.shape[1], device=device) < lengths[:, None]
    which = torch.zeros_like(real)
    for row, ids, mask in zip(which, blocks, real):
        row[ids[mask].long()] = True
    return lengths, which


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--contexts", default=f"{32 * K},{128 * K},{512 * K},{M}")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fp8_shortlist.json")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hopper_backend.TUNING = replace(hopper_backend.TUNING, scan_blocks=0)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, Triton's interpreter"
    rows = []
    for context in map(int, given.contexts.split(",")):
        for data in ("random", "clustered"):
            lengths, which = listed(context, data, 0, device)
            pages = int(which.any(0).sum())
            rows.append(dict(
                data=data, context=context, blocks=which.shape[1], listed=lengths.tolist(), pages=pages,
                # 128 B of fp8 a token, its page's exact keys where any head lists it; against all exact keys.
                bytes_of_exact=round(0.5 + pages / which.shape[1], 4),
            ))  # fmt: skip
            print(rows[-1], flush=True)
            given.output.write_text(
                json.dumps(dict(benchmark="fp8_shortlist", device=where, rows=rows), indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
