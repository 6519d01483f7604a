"""Claim: on two CPU cores a long prompt costs linear memory, and a fraction of transformers' time.

Both sides build the same 4-layer M3 (hidden 256, 8/2 heads of 64, index 2 x 64, block 128, top 16, 16 experts top-2 of
256, first layer dense) with random weights and read the same prompt; every measurement is a process of its own, so that
its peak memory is its own. transformers runs under a memory limit and is reported as out of memory when it hits it.

    python benchmarks/cpu_prefill.py                    # ours at 8 K to 131 K, transformers at 8 K
    python benchmarks/cpu_prefill.py --lengths 16384 --baseline 16384 --limit-gib 26   # takes 22.9 GiB

Decode at two lengths and a large copy take turns in one process, so that all three meet the same machine, and no cache
of the processor keeps what one step read for the next.

Writes benchmarks/results/cpu_prefill.json and prints the table.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "cpu_prefill.json"
DECODE_ROUNDS = 40


def model_config():
    from openm3.config import M3Config, SparseConfig, TextConfig, VisionConfig

    layers = (False, True, True, True)
    text = TextConfig(
        vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        head_dim=64, rotary_dim=32, dense_intermediate_size=768, intermediate_size=256, shared_intermediate_size=256,
        num_local_experts=16, num_experts_per_tok=2, sparse_layers=layers, moe_layers=layers,
        sparse=SparseConfig(index_heads=2, index_dim=64), bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision = VisionConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2)
    return M3Config(
        text=text, vision=vision, projector_hidden_size=64, image_token_id=4094, video_token_id=4095, dtype="float32"
    )


def prompt(length: int):
    import torch

    return torch.randint(3, 4000, (length,), generator=torch.Generator().manual_seed(0))


def ours(directory: Path, length: int) -> dict[str, float]:
    import torch

    from openm3.checkpoint import load_model

    model = load_model(directory)
    ids = prompt(length)
    with torch.inference_mode():
        model(ids[:512])
        start = time.perf_counter()
        model.logits(model(ids).hidden[-1:])
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": peak_bytes()}


def decode(directory: Path, short: int, long: int, rounds: int = DECODE_ROUNDS) -> dict[str, float]:
    """Medians of decode steps over paged caches of two lengths, and what the longer one's extra bytes cost in units of
    the copy that takes turns with them."""
    import torch

    from openm3.checkpoint import load_model
    from openm3.model import KVCache, plan_args
    from openm3.msa import Plan

    model, copy, times = load_model(directory), Copy(), {0: [], short: [], long: []}
    caches = {n: KVCache(model.config, -(-(n + rounds) // 128)) for n in (short, long)}
    for cache in caches.values():
        for layer in cache.layers:
            for tensor in (layer.k, layer.v, layer.index_k):
                if tensor is not None:
                    tensor.normal_()
    with torch.inference_mode():
        for number in range(rounds):
            for n, cache in caches.items():
                times[0].append(copy())
                start = time.perf_counter()
                table = torch.arange(cache.num_pages, dtype=torch.int32)[None]
                plan = Plan.paged(table, [n + number + 1], [0, 1], **plan_args(model.config))
                model.logits(model(prompt(1), cache=cache, plan=plan).hidden)
                times[n].append(time.perf_counter() - start)
    seconds = {n: statistics.median(found[3:]) for n, found in times.items()}
    rate, extra = copy.bytes / seconds[0], decode_bytes(long) - decode_bytes(short)
    return {
        "short": short, "long": long, "short_ms": seconds[short] * 1e3, "long_ms": seconds[long] * 1e3,
        "extra_bytes": extra, "copy_bytes_per_second": rate, "ratio": (seconds[long] - seconds[short]) * rate / extra,
    }  # fmt: skip


def transformers(directory: Path, length: int) -> dict[str, float]:
    import torch
    from transformers import MiniMaxM3SparseForConditionalGeneration

    model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    ids = prompt(length)[None]
    with torch.inference_mode():
        model(input_ids=ids[:, :512], logits_to_keep=1)
        start = time.perf_counter()
        model(input_ids=ids, logits_to_keep=1, use_cache=False)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": peak_bytes()}


class Copy:
    """A copy of 256 MiB; a call takes so many seconds, and `bytes` are read and written."""

    def __init__(self) -> None:
        import torch

        self.x = torch.empty(256 << 20, dtype=torch.uint8).fill_(1)
        self.y = torch.zeros_like(self.x)
        self.bytes = 2 * self.x.numel()

    def __call__(self) -> float:
        start = time.perf_counter()
        self.y.copy_(self.x)
        return time.perf_counter() - start


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def decode_bytes(length: int) -> int:
    """Bytes that a decode step reads more of: the dense layer's keys and values, the sparse ones' index keys."""
    text = model_config().text
    dense = sum(not sparse for sparse in text.sparse_layers) * 2 * text.num_key_value_heads * text.head_dim
    return length * 4 * (dense + sum(text.sparse_layers) * text.sparse.index_dim)


def measure(side: str, directory: Path, lengths: list[int], threads: int, limit: int) -> dict[str, object]:
    sizes = [str(n) for n in (threads, limit, *lengths)]
    command = [sys.executable, __file__, "--measure", side, str(directory), *sizes]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode < 0 or "emory" in done.stderr or "alloc" in done.stderr:
        return {"out_of_memory": True, "limit_bytes": limit}
    raise SystemExit(done.stderr)


def worker(side: str, directory: str, threads: str, limit: str, *lengths: str) -> None:
    import torch

    resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
    torch.set_num_threads(int(threads))
    run = {"ours": ours, "transformers": transformers, "decode": decode}[side]
    print(json.dumps(run(Path(directory), *map(int, lengths))))


def table(result: dict) -> str:
    lines = [
        "| tokens | openm3 tok/s | peak | transformers tok/s | peak | ratio |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for length, row in result["prefill"].items():
        mine, theirs = row["ours"], row.get("transformers")
        cells = [f"{int(length):,}", f"{int(length) / mine['seconds']:,.0f}", f"{mine['peak_bytes'] / 1e9:.2f} GB"]
        if theirs is None:
            cells += ["", "", ""]
        elif theirs.get("out_of_memory"):
            cells += ["out of memory", f"> {theirs['limit_bytes'] / 1e9:.0f} GB", ""]
        else:
            cells += [f"{int(length) / theirs['seconds']:,.0f}", f"{theirs['peak_bytes'] / 1e9:.1f} GB"]
            cells += [f"{theirs['seconds'] / mine['seconds']:.1f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    if d := result.get("decode"):
        lines.append(
            f"\nDecode: {d['short_ms']:.1f} ms at {d['short']:,} tokens, {d['long_ms']:.1f} ms at {d['long']:,}: "
            f"the extra {d['extra_bytes'] / 1e6:.0f} MB cost {d['ratio']:.2f} times their share at copy speed "
            f"({d['copy_bytes_per_second'] / 1e9:.1f} GB/s)."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 65536, 131072])
    parser.add_argument(
        "--baseline", type=int, nargs="*", default=[8192], help="lengths at which transformers runs too"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit-gib", type=float, default=23.0, help="memory limit of each process")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return worker(*args.measure)

    from openm3 import save_model
    from openm3.model import M3

    limit = int(args.limit_gib * 2**30)
    result: dict = {"cpu": cpu_name(), "threads": args.threads, "python": platform.python_version(), "prefill": {}}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "model"
        save_model(M3(model_config()), directory)
        for length in sorted({*args.lengths, *args.baseline}):
            row = {"ours": measure("ours", directory, [length], args.threads, limit)}
            if length in args.baseline:
                row["transformers"] = measure("transformers", directory, [length], args.threads, limit)
            result["prefill"][str(length)] = row
            print(f"{length:,} tokens: {row}", file=sys.stderr, flush=True)
        if len(long := [n for n in args.lengths if n >= 16384]) > 1:
            result["decode"] = measure("decode", directory, [min(long), max(long)], args.threads, limit)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
