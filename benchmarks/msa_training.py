"""Claim: on one GPU, training with MSA takes less memory than dense attention, and from 32 K tokens on less time.

One packed sequence of T tokens, bf16, forward and backward of one layer's attention with M3's heads (64 query heads,
4 KV heads, head dim 128, blocks of 128, top 16) and with the bundled model's (8, 2, 64, 32, 16). In one run: our
backends over the same selection, our dense attention, and PyTorch's causal attention (the fastest it has here) as the
baseline. Selections are random blocks, each query's own among them: the hardest to share work on.

    python benchmarks/msa_training.py --seconds 120

Writes benchmarks/results/msa_training_CARD.json after every measurement: medians of ms, peak bytes beyond the inputs,
and the rate in FLOPs that attention needs (backward: 2.5 times forward).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from msa_attention import RESULTS, Clock, Settings, device_name
from msa_sides import Geometry
from torch import Tensor

from openm3.msa import Plan, dense_attention, sparse_attention

GEOMETRIES = {"m3": Geometry(), "nano": Geometry(8, 2, 64, 2, 64, 32, 16)}
LENGTHS = (8192, 32768, 131072)
BACKENDS = ("triton", "torch")


def random_blocks(g: Geometry, tokens: int, generator: torch.Generator) -> Tensor:
    """int32 [Hi, T, topk]: each query's own block and others before it, all different, ascending, -1 last."""
    device, count = generator.device, max(g.topk, -(-tokens // g.block))
    block, parts = torch.arange(count, device=device), []
    for own in (torch.arange(tokens, device=device) // g.block).split(4096):
        keys = torch.rand(g.index_heads, len(own), count, device=device, generator=generator)
        keys.masked_fill_(block > own[:, None], -1.0).masked_fill_(block == own[:, None], 2.0)
        best = keys.topk(g.topk, -1)
        parts.append(torch.where(best.values < 0, count, best.indices).sort(-1).values)
    blocks = torch.cat(parts, 1)
    return blocks.masked_fill(blocks == count, -1).int()


def sides(g: Geometry, tokens: int, device: str) -> dict[str, tuple[Callable[[], Tensor], int]]:
    """By name: a function that computes the output of q, k, v, and the forward FLOPs."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(heads: int) -> Tensor:
        x = torch.randn(tokens, heads, g.dim, device=device, dtype=torch.bfloat16, generator=generator)
        return x.requires_grad_()

    q, k, v = draw(g.heads), draw(g.kv_heads), draw(g.kv_heads)
    plan = Plan.packed([0, tokens], block_size=g.block, topk=g.topk, device=device)
    blocks = random_blocks(g, tokens, generator)

    def baseline() -> Tensor:
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)

    sparse, dense = g.attend_flops(0, tokens), g.dense_flops(0, tokens)
    found = {"dense, PyTorch": (baseline, dense)}
    for name in BACKENDS:
        found[f"sparse, {name}"] = partial(sparse_attention, q, k, v, blocks, plan, backend=name), sparse
        found[f"dense, {name}"] = partial(dense_attention, q, k, v, plan, backend=name), dense
    return found


def both_ways(call: Callable[[], Tensor]) -> None:
    out = call()
    out.backward(torch.ones_like(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--seconds", type=float, default=300.0, help="begin no measurement after so many")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    card = device_name(args.device)
    output = args.output or RESULTS / f"msa_training_{card.lower().replace(' ', '_')}.json"
    about = {"device": card, "torch": torch.__version__}
    clock = Clock(replace(Settings(), device=args.device, budget_ms=300.0, repeats=(2, 20)))
    deadline, records = time.monotonic() + args.seconds, []
    for tokens in args.lengths:
        for heads, g in GEOMETRIES.items():
            for name, (call, flops) in sides(g, tokens, args.device).items():
                if time.monotonic() > deadline:
                    return
                record: dict = {"heads": heads, "tokens": tokens, "side": name}
                try:
                    clock.first(partial(both_ways, call))  # compiles
                    forward, whole = median(clock.times(call)), median(clock.times(partial(both_ways, call)))
                    _, facts = clock.first(partial(both_ways, call))
                    record |= {"forward_ms": forward, "both_ms": whole, "peak_bytes": facts.get("peak_bytes"),
                               "tflops": 3.5 * flops / whole / 1e9}  # fmt: skip
                except (RuntimeError, ValueError) as error:
                    record["error"] = f"{type(error).__name__}: {error}"[:200]
                records.append(record)
                print(record, flush=True)
                output.write_text(json.dumps(about | {"rows": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
