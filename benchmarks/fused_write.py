"""Claim: norm, RoPE and cache write of M3's projections take about the time of a copy of the bytes they must move.

One layer of M3 (64 query heads, 4 KV heads, 4 index heads and one index key, all of 128, blocks of 128 tokens), bf16,
caches of bf16 and fp8, for decode and prefill steps: the one launch against a copy of as many bytes in the same run,
and against the same computation in PyTorch's operations. Medians; calls run within a CUDA graph over several sets of
tensors, so that all but the smallest steps find the L2 cache cold.

    python benchmarks/fused_write.py            # needs a CUDA device; writes benchmarks/results/fused_write.json

Without a GPU it says so and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from openm3.ops import apply_rope, cache_write, qk_norm_rope_store, rms_norm

RESULTS = Path(__file__).parent / "results" / "fused_write.json"
HQ, HKV, HI, D, ROTARY, BLOCK = 64, 4, 4, 128, 64, 128
COLD_BYTES = 256 << 20  # what one round moves at least


def problem(tokens: int, cache: torch.dtype) -> cache_write.Call:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    pages = -(-tokens // BLOCK) + 64
    q, k, v = draw(tokens, HQ + 2 * HKV, D).split((HQ, HKV, HKV), dim=1)
    heads = draw(tokens, HI + 1, D)
    angles = torch.rand(tokens, ROTARY // 2, device="cuda") * 6.28
    by_head = [torch.zeros(HKV, pages, BLOCK, D, device="cuda", dtype=cache).transpose(0, 1) for _ in range(2)]
    index = torch.zeros(pages, BLOCK, D, device="cuda", dtype=cache)
    # A prompt fills whole pages, wherever they lie; each sequence of a decode batch writes one token.
    pages_of = torch.randperm(pages, device="cuda")
    step = torch.arange(tokens, device="cuda")
    slots = pages_of[step // BLOCK] * BLOCK + step % BLOCK if tokens > 64 else step * BLOCK % (pages * BLOCK) + 5
    norms = [draw(D) * 0.1 for _ in range(4)]
    scales = (0.05 if cache == torch.float8_e4m3fn else None,) * 3
    return cache_write.Call(
        q, k, v, *norms[:2], angles.cos(), angles.sin(), *by_head, slots, 1e-6, heads[:, :-1], heads[:, -1], *norms[2:],
        index, *scales,
    )  # fmt: skip


def moved(call: cache_write.Call) -> int:
    """Bytes that must be read and written: projections in, queries out, keys and values into the caches, the angles."""
    queries = [call.q, call.index_q]
    stored = [(call.k, call.k_cache), (call.v, call.v_cache), (call.index_k, call.index_k_cache)]
    total = sum(2 * x.numel() * x.itemsize for x in queries)
    total += sum(x.numel() * (x.itemsize + cache.itemsize) for x, cache in stored)
    return total + sum(x.numel() * x.itemsize for x in (call.cos, call.sin, call.slots))


def fused(call: cache_write.Call) -> None:
    qk_norm_rope_store(*call[:10], **dict(zip(call._fields[10:], call[10:])) | {"backend": "triton"})


def median_us(functions: list[Callable[[], object]], repeats: int) -> float:
    """Median time of one call, in a CUDA graph that calls each function once."""
    for function in functions:
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    times = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(functions))
    return statistics.median(times[3:])


def plain(call: cache_write.Call) -> Callable[[], object]:
    """PyTorch's operations, without their look at the slots' range, which a graph cannot hold."""
    page, offset = call.slots // BLOCK, call.slots % BLOCK

    def turned(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return apply_rope(rms_norm(x, weight, call.eps), call.cos, call.sin)

    def step() -> None:
        turned(call.q, call.q_norm), turned(call.index_q, call.index_q_norm)
        keys = turned(call.k, call.k_norm), turned(call.index_k[:, None], call.index_k_norm).squeeze(1)
        call.k_cache[page, :, offset] = cache_write.quantized(keys[0], call.k_cache.dtype, call.k_scale)
        call.v_cache[page, :, offset] = cache_write.quantized(call.v, call.v_cache.dtype, call.v_scale)
        call.index_k_cache[page, offset] = cache_write.quantized(keys[1], call.index_k_cache.dtype, call.index_k_scale)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512, 8192, 32768])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("fused_write: needs a CUDA device, there is none")
    rows = []
    for cache in (torch.bfloat16, torch.float8_e4m3fn):
        for tokens in args.tokens:
            first = problem(tokens, cache)
            if reason := cache_write._refusal(first):
                print(f"{cache}: {reason}")
                continue
            size = moved(first)
            calls = [first, *(problem(tokens, cache) for _ in range(min(32, COLD_BYTES // size)))]
            pairs = [[torch.empty(size // 2, dtype=torch.uint8, device="cuda") for _ in range(2)] for _ in calls]
            row = {
                "cache": str(cache).removeprefix("torch."), "tokens": tokens, "bytes": size,
                "fused_us": median_us([lambda c=c: fused(c) for c in calls], args.repeats),
                "copy_us": median_us([lambda a=a, b=b: b.copy_(a) for a, b in pairs], args.repeats),
                "plain_us": median_us([plain(c) for c in calls], args.repeats),
            }  # fmt: skip
            row |= {"to_copy": row["fused_us"] / row["copy_us"], "to_plain": row["fused_us"] / row["plain_us"]}
            rows.append(row)
            print(
                f"{row['cache']:>14} {tokens:>6} tokens: {row['fused_us']:8.1f} us, {row['to_copy']:.2f} of a copy, "
                f"{size / row['fused_us'] / 1e3:.0f} GB/s, PyTorch's operations {row['plain_us']:.1f} us"
            )
            del calls, pairs, first
            torch.cuda.empty_cache()
    versions = {"torch": torch.__version__, "triton": __import__("triton").__version__}
    result = {"gpu": torch.cuda.get_device_name(), **versions, "repeats": args.repeats, "rows": rows}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
