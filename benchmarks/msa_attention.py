"""Claim: on one GPU, MSA's attention at M3's heads comes near what the card can do, and far under dense attention.

One layer of M3 (64 query heads, 4 KV heads, head dim 128, 4 index heads, blocks of 128, top 16, bf16), caches in pages
in random order. In one run and on the same numbers: our backends, vLLM's and SGLang's M3 operators where they can be
imported, and dense grouped-query attention through cuDNN and FlashAttention as PyTorch has them.

    ceilings   an 8192^3 product and a device copy: what the rates below are fractions of
    prefill    a chunk of 8192 queries at the end of its context, selection and attention apart, on random data and on
               data whose neighbouring queries mostly agree
    decode     one query a sequence, in a CUDA graph over enough copies of the caches that none is left in the L2
    fp8        decode with fp8 index keys: exact (both copies, the bf16 keys' selection) and approximate (fp8 alone)
    dense      the same chunks and steps attending to everything
    prompts    whole prompts, every chunk of the longest run in its turn, summed up to each length

    python benchmarks/msa_attention.py                                 # all of it, several minutes
    python benchmarks/msa_attention.py --quick --seconds 120           # the figures that matter most
    PYTHONPATH=/where/the/peers/are python benchmarks/msa_attention.py --what ceilings,prefill
    python benchmarks/plot_msa.py benchmarks/results/msa_attention_nvidia_h200.json

Sections run in the order given, the slow `torch` backend behind all others. The JSON is written after every
measurement; what fails is an {"error": ...} there. `--resume` goes on with what a stopped run has not measured. Exit
code 3: the GPU was lost to an error, so the rest needs a new process (`--resume` skips what lost it).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
from msa_sides import (
    DENSE,
    PEERS,
    Calls,
    Case,
    Geometry,
    Packed,
    by_head,
    check_attention,
    check_dense,
    check_selection,
    make_case,
    missing,
    ours,
    ours_dense,
    sdpa,
    sdpa_chunk,
    union,
)
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
WHATS = ("ceilings", "prefill", "decode", "fp8", "dense", "prompts")
SLOW = ("torch", "reference")  # backends that run behind all others
STOP_WALK = 60.0  # seconds that one side's whole prompts may take
K, M = 1 << 10, 1 << 20


class DeviceLost(RuntimeError):
    """An error that nothing on this device survives in this process."""


class OutOfTime(RuntimeError):
    """The seconds of this run are over."""


@dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are the whole run. Lists are in the order they are measured."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    geometry: Geometry = field(default_factory=Geometry)
    what: tuple[str, ...] = WHATS
    backends: tuple[str, ...] = ("triton", "torch")
    chunk: int = 8 * K
    ends: tuple[int, ...] = (128 * K, M, 32 * K, 512 * K)
    data: tuple[str, ...] = ("random", "clustered")
    steps: tuple[tuple[int, int], ...] = ((1, 128 * K), (1, M), (8, 128 * K), (64, 32 * K), (1, 32 * K), (8, 512 * K))
    fp8_steps: tuple[tuple[int, int], ...] = ((1, M), (1, 128 * K), (8, 512 * K))
    dense_ends: tuple[int, ...] = (128 * K, M, 32 * K, 512 * K, 8 * K)
    whole: tuple[int, ...] = (32 * K, 128 * K)  # prompts that dense attention takes in one call
    prompts: tuple[int, ...] = (32 * K, 64 * K, 128 * K, 256 * K, 512 * K, M)
    product: int = 8 * K
    copied: int = 2 << 30
    budget_ms: float = 150.0
    repeats: tuple[int, int] = (3, 30)  # at least, at most
    # Bytes between two uses of a decode step's caches; None: four times the L2, at least 300 MiB.
    cold: int | None = None
    seconds: float = 3600.0


QUICK = dict(
    ends=(128 * K, M), steps=((1, 128 * K), (1, M), (8, 128 * K)), fp8_steps=((1, M),), dense_ends=(128 * K, M, 8 * K),
    whole=(32 * K,), prompts=(32 * K, 128 * K), budget_ms=60.0, repeats=(3, 12),
)  # fmt: skip


class Clock:
    """Times calls on a device: with its events on a GPU, with the host's clock on a CPU."""

    def __init__(self, settings: Settings):
        self.settings, self.cuda = settings, settings.device.startswith("cuda")
        if self.cuda:
            self.l2 = torch.cuda.get_device_properties(settings.device).L2_cache_size
            self.scratch = torch.empty(max(256 * M, 2 * self.l2), dtype=torch.uint8, device=settings.device)

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.settings.device)

    @property
    def cold(self) -> int:
        """Bytes that have to be read between two uses of a cache for it to have left the L2."""
        least = max(300 * M, 4 * self.l2) if self.cuda else 0
        return least if self.settings.cold is None else self.settings.cold

    def first(self, call: Callable) -> tuple[object, dict]:
        """What a first call gives; how long it took, with compilation; memory it took beyond what was there."""
        self.sync()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.settings.device)
            before = torch.cuda.memory_allocated(self.settings.device)
        start = time.perf_counter()
        out = call()
        self.sync()
        facts = {"first_call_s": time.perf_counter() - start}
        if self.cuda:
            facts["peak_bytes"] = torch.cuda.max_memory_allocated(self.settings.device) - before
        return out, facts

    def times(self, call: Callable) -> list[float]:
        """ms of repeated calls, each with a cold L2; as many as fit the budget."""
        once = self.events(call, 1)[0]
        least, most = self.settings.repeats
        return self.events(call, int(min(max(self.settings.budget_ms / max(once, 1e-3), least), most)))

    def events(self, call: Callable, count: int) -> list[float]:
        if not self.cuda:
            return [self._host_ms(call) for _ in range(count)]
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for begin, end in pairs:
            self.scratch.zero_()
            begin.record()
            call()
            end.record()
        self.sync()
        return [begin.elapsed_time(end) for begin, end in pairs]

    def _host_ms(self, call: Callable) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    def graph_times(self, calls: list[Callable], inner: int = 3) -> list[float]:
        """ms of one call, in replays of one CUDA graph that holds all of them in turn; they have run before."""
        for call in calls:
            call()
        self.sync()
        if not self.cuda:
            return [ms / len(calls) for ms in self.times(lambda: [call() for call in calls])]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(inner):
                for call in calls:
                    call()
        graph.replay()
        return [ms / (inner * len(calls)) for ms in self.times(graph.replay)]


class Record:
    """The JSON: what was measured so far, written after each measurement; nothing is measured twice."""

    def __init__(self, path: Path, header: dict, seconds: float, resume: bool, clock: Clock):
        self.path, self.clock, self.deadline = path, clock, time.monotonic() + seconds
        self.data = json.loads(json.dumps(header)) | {"results": []}
        if resume and path.exists():
            old = json.loads(path.read_text())
            if old["device"] != header["device"]:
                raise SystemExit(f"{path}: of {old['device']}, this is {header['device']}; take another --output")
            self.data["results"] = old["results"]
            if "running" in old:
                self.data["results"].append(old["running"] | {"error": "the run ended while this was measured"})
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(part, self.path)

    def in_time(self) -> bool:
        return time.monotonic() < self.deadline

    def find(self, **fields: object) -> list[dict]:
        return [r for r in self.data["results"] if all(r.get(key) == value for key, value in fields.items())]

    def measure(self, work: Callable[[dict], None], **fields: object) -> None:
        """`work(record)` fills in a record that begins with `fields`; an exception becomes its `error`."""
        if self.find(**fields):
            return
        if not self.in_time():
            raise OutOfTime
        record, start = dict(fields), time.perf_counter()
        self.data["running"] = fields
        self.write()
        try:
            work(record)
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {error}"[:400]
        record["wall_s"] = time.perf_counter() - start
        self.data.pop("running")
        self.data["results"].append(record)
        self.write()
        print(line(record), flush=True)
        if "error" in record:
            gc.collect()
            try:
                self.clock.sync()
                if self.clock.cuda:
                    torch.cuda.empty_cache()
            except Exception as error:
                raise DeviceLost(str(error)) from None

    def ceiling(self, side: str, unit: str) -> float | None:
        return next((r[unit] for r in self.find(what="ceilings", side=side) if unit in r), None)

    def rate(self, times: list[float], *, flops: int = 0, bytes: int = 0) -> dict:
        """Median, spread, and the rate with its fraction of the ceiling measured in this run."""
        ms = median(times)
        row = {"ms": ms, "min_ms": min(times), "max_ms": max(times), "repeats": len(times)}
        for amount, unit, scale, side in ((flops, "tflops", 1e9, "matmul"), (bytes, "gb_s", 1e6, "copy")):
            if amount:
                ceiling = self.ceiling(side, unit)
                row |= {"flops" if flops else "bytes": amount, unit: amount / ms / scale}
                row["of_ceiling"] = row[unit] / ceiling if ceiling else None
        return row


def line(record: dict) -> str:
    """One measurement as one line of text."""
    names = [str(record[key]) for key in ("what", "side", "data", "keys") if key in record]
    if "context" in record:
        names.append(f"{record.get('batch', 1)} x {record['context']}")
    parts = []
    for name, value in record.items():
        if isinstance(value, dict) and "ms" in value:
            unit = next((u for u in ("tflops", "gb_s") if u in value), None)
            rate = f" ({value[unit]:.0f} {unit}{percent(value.get('of_ceiling'))})" if unit else ""
            parts.append(f"{name} {value['ms']:.4g} ms{rate}")
        elif name in ("tflops", "gb_s", "ms", "total_ms"):
            parts.append(f"{name} {value:.4g}")
        elif name == "check":
            parts += [f"{k} {v:.3g}" for k, v in value.items() if isinstance(v, float)]
        elif name == "sums":
            parts += [f"{length}: {row['total_ms']:.4g} ms" for length, row in value.items()]
        elif name == "differ":
            parts.append(f"differ {value}")
        elif name in ("error", "union_of_8"):
            parts.append(f"{name} {value if isinstance(value, str) else format(value, '.1f')}")
    return f"{' '.join(names)}: {', '.join(parts)}"


def percent(share: float | None) -> str:
    return "" if share is None else f", {share:.0%}"


class Bench:
    """One run: the sections, each a walk over cases and sides."""

    def __init__(self, settings: Settings, output: Path, resume: bool = False):
        self.settings, self.clock = settings, Clock(settings)
        self.sides: dict[str, Callable[[Case], Calls]] = {name: partial(ours, name) for name in settings.backends}
        absent = {name: reason for name in PEERS if (reason := missing(name))}
        self.sides |= {name: side for name, side in PEERS.items() if name not in absent}
        header = about(settings) | {"not_importable": absent}
        self.record = Record(output, header, settings.seconds, resume, self.clock)

    def run(self) -> dict:
        """All sections for the fast sides, then for the slow ones."""
        try:
            with torch.no_grad():
                for slow in (False, True):
                    names = [name for name in self.sides if (name in SLOW) == slow]
                    for what in self.settings.what:
                        getattr(self, what)(names, slow)
        except OutOfTime:
            self.record.data["stopped"] = f"the {self.settings.seconds:.0f} seconds of this run were over"
            self.record.write()
        return self.record.data

    @contextmanager
    def caches(
        self, batch: int, context: int, queries: int, data: str, copies: int
    ) -> Iterator[Callable[[], list[Case]]]:
        """A function that makes the cases when a measurement first asks; they are gone afterwards."""
        s = self.settings

        @cache
        def cases() -> list[Case]:
            return [make_case(s.geometry, s.device, s.dtype, batch, context, queries, data, n) for n in range(copies)]

        yield cases
        cases.cache_clear()
        gc.collect()
        if self.clock.cuda:
            torch.cuda.empty_cache()

    # Sections ----------------------------------------------------------------------------------------------------

    def ceilings(self, names: list[str], slow: bool) -> None:
        if slow:
            return
        s, clock, record = self.settings, self.clock, self.record

        def matmul(row: dict) -> None:
            a, b = (torch.randn(s.product, s.product, device=s.device, dtype=s.dtype) for _ in range(2))
            a @ b
            row |= record.rate(clock.times(lambda: a @ b), flops=2 * s.product**3)

        def copy(row: dict) -> None:
            a = torch.randint(256, (s.copied,), dtype=torch.uint8, device=s.device)
            b = torch.empty_like(a)
            b.copy_(a)
            row |= record.rate(clock.times(lambda: b.copy_(a)), bytes=2 * s.copied)

        record.measure(matmul, what="ceilings", side="matmul")
        record.measure(copy, what="ceilings", side="copy")
        for length in s.whole:
            for side in DENSE:
                work = partial(self._dense_whole, side, length)
                record.measure(work, what="dense prompt", side=side, context=length)

    def prefill(self, names: list[str], slow: bool) -> None:
        for data in self.settings.data:
            for end in self.settings.ends:
                with self.caches(1, end, self.settings.chunk, data, 1) as cases:
                    for side in names:
                        fields = dict(what="prefill", side=side, data=data, batch=1, context=end)
                        self.record.measure(partial(self._prefill, side, cases), **fields)

    def _prefill(self, side: str, cases: Callable, row: dict) -> None:
        case, clock, g = cases()[0], self.clock, self.settings.geometry
        calls = self.sides[side](case)
        blocks, facts = clock.first(calls.select)
        flops = g.select_flops(case.prefix, case.queries)
        row["select"] = self.record.rate(clock.times(calls.select), flops=flops) | facts
        attend = partial(calls.attend, blocks)
        out, facts = clock.first(attend)
        row["check"] = checked(case, blocks, out)
        row |= row["check"].pop("unions", {})
        flops = g.attend_flops(case.prefix, case.queries)
        row["attend"] = self.record.rate(clock.times(attend), flops=flops) | facts
        row["total_ms"] = row["select"]["ms"] + row["attend"]["ms"]

    def decode(self, names: list[str], slow: bool) -> None:
        for batch, context in self.settings.steps:
            with self.caches(batch, context, 1, "random", self._copies(batch, context)) as cases:
                for side in names:
                    fields = dict(what="decode", side=side, batch=batch, context=context)
                    self.record.measure(partial(self._decode, side, cases), **fields)

    def fp8(self, names: list[str], slow: bool) -> None:
        """`differ`: entries of the first selection that are not those of the bf16 keys."""
        for batch, context in self.settings.fp8_steps:
            with self.caches(batch, context, 1, "random", self._copies(batch, context, 1)) as cases:
                for side, keys in product((name for name in names if name not in PEERS), ("both", "fp8")):
                    fields = dict(what="fp8", side=side, keys=keys, batch=batch, context=context)
                    self.record.measure(partial(self._decode, side, cases), **fields)

    def _copies(self, batch: int, context: int, width: int = 2) -> int:
        g = self.settings.geometry
        return max(1, -(-self.clock.cold // (g.select_bytes(batch, context, width) + g.attend_bytes(batch, context))))

    def _decode(self, side: str, cases: Callable, row: dict) -> None:
        clock, g, rate = self.clock, self.settings.geometry, self.record.rate
        keys = {"keys": row["keys"]} if "keys" in row else {}
        calls = [self.sides[side](case, **keys) for case in cases()]
        row["copies"] = len(calls)
        width, sizes = self.settings.dtype.itemsize, (row["batch"], row["context"])
        select, attend = g.select_bytes(*sizes, 1 if keys else width), g.attend_bytes(*sizes, width)
        (blocks, out), row["first"] = clock.first(lambda: both(calls[0]))
        row["check"] = checked(cases()[0], blocks, out)
        if keys:
            row["differ"] = int((blocks != self.sides[side](cases()[0]).select()).sum())
        steps = {
            "both": ([partial(both, c) for c in calls], select + attend),
            "select": ([c.select for c in calls], select),
            "attend": ([partial(c.attend, c.select()) for c in calls], attend),
        }
        for name, (step, size) in steps.items():
            row[name] = rate(clock.graph_times(step), bytes=size)
            row["total_ms"] = row["both"]["ms"]

    def dense(self, names: list[str], slow: bool) -> None:
        s = self.settings
        sides = [*([] if slow else DENSE), *(name for name in names if name not in PEERS)]
        for batch, context in s.steps:
            with self.caches(batch, context, 1, "random", self._copies(batch, context)) as cases:
                for side in sides:
                    work = partial(self._dense_step, side, cases)
                    self.record.measure(work, what="dense decode", side=side, batch=batch, context=context)
        for end in s.dense_ends:
            with self.caches(1, end, min(s.chunk, end), "random", 1) as cases:
                for side in sides:
                    work = partial(self._dense_chunk, side, cases)
                    self.record.measure(work, what="dense prefill", side=side, batch=1, context=end)

    def _dense_call(self, side: str, case: Case) -> Callable:
        return sdpa_chunk(side, Packed.of(case)) if side in DENSE else ours_dense(side, case)

    def _dense_check(self, side: str, case: Case, out: Tensor | tuple[Tensor, ...]) -> dict:
        """Some rows of the first sequence; of a chunk in two parts, the part that is further off."""
        packed, before = Packed.of(case), case.prefix
        q, k, v = packed.q[0], packed.k[0], packed.v[0]
        if side not in DENSE:
            return check_dense(q, k, v, out[: case.queries].transpose(0, 1), before)
        if case.queries == 1:
            return check_dense(q, k, v, out[0][0], before)
        checks = [check_dense(q, k[:, before:], v[:, before:], out[0][0], 0)]
        if before:
            checks.append(check_dense(q, k[:, :before], v[:, :before], out[1][0], before))
        return max(checks, key=lambda check: check["relative_error"])

    def _dense_chunk(self, side: str, cases: Callable, row: dict) -> None:
        case = cases()[0]
        call = self._dense_call(side, case)
        out, facts = self.clock.first(call)
        row["check"] = guarded(partial(self._dense_check, side, case, out))
        del out
        flops = self.settings.geometry.dense_flops(case.prefix, case.queries)
        row["attend"] = self.record.rate(self.clock.times(call), flops=flops) | facts
        row["total_ms"] = row["attend"]["ms"]

    def _dense_step(self, side: str, cases: Callable, row: dict) -> None:
        calls = [self._dense_call(side, case) for case in cases()]
        out, facts = self.clock.first(calls[0])
        row["check"] = guarded(partial(self._dense_check, side, cases()[0], out))
        size = self.settings.geometry.dense_bytes(row["batch"], row["context"], self.settings.dtype.itemsize)
        row["attend"] = self.record.rate(self.clock.graph_times(calls), bytes=size) | facts
        row["total_ms"] = row["attend"]["ms"]

    def _dense_whole(self, side: str, length: int, row: dict) -> None:
        s, g = self.settings, self.settings.geometry
        q, k, v = (
            torch.randn(1, heads, length, g.dim, device=s.device, dtype=s.dtype)
            for heads in (g.heads, g.kv_heads, g.kv_heads)
        )
        call = partial(sdpa, side, q, k, v, True)
        out, facts = self.clock.first(call)
        row["check"] = guarded(lambda: check_dense(q[0], k[0], v[0], out[0], 0))
        row["attend"] = self.record.rate(self.clock.times(call), flops=g.dense_flops(0, length)) | facts
        row["total_ms"] = row["attend"]["ms"]

    def prompts(self, names: list[str], slow: bool) -> None:
        s = self.settings
        longest = max(s.prompts)
        for data in s.data:
            with self.caches(1, longest, s.chunk, data, 1) as cases:
                for side in names:
                    fields = dict(what="prompts", side=side, data=data)
                    self.record.measure(partial(self._prompts, side, cases), **fields)

    def _prompts(self, side: str, cases: Callable, row: dict) -> None:
        """Each chunk of the longest prompt, run once before it is timed; a shorter prompt is the first of them."""
        s, clock, start = self.settings, self.clock, time.monotonic()
        row |= {
            "method": "sums of chunks, each the median of three calls",
            "chunk": s.chunk,
            "select_ms": [],
            "attend_ms": [],
            "sums": {},
        }
        for end in range(s.chunk, max(s.prompts) + 1, s.chunk):
            if not self.record.in_time() or time.monotonic() - start > STOP_WALK:
                row["stopped"] = f"out of time before the chunk that ends at {end}"
                break
            calls = self.sides[side](cases()[0].ending_at(end))
            blocks, _ = both(calls)
            row["select_ms"].append(median(clock.events(calls.select, 3)))
            row["attend_ms"].append(median(clock.events(partial(calls.attend, blocks), 3)))
            if end in s.prompts:
                select, attend = sum(row["select_ms"]), sum(row["attend_ms"])
                row["sums"][str(end)] = {"select_ms": select, "attend_ms": attend, "total_ms": select + attend}


def both(calls: Calls) -> tuple[Tensor, Tensor]:
    blocks = calls.select()
    return blocks, calls.attend(blocks)


def checked(case: Case, blocks: Tensor, out: Tensor) -> dict:
    """Some rows against the definition in float64, and how far neighbouring queries agree."""

    def check() -> dict:
        ours = by_head(blocks, case)
        found = check_selection(case, ours) | check_attention(case, ours, out)
        if case.queries > 8:
            found["unions"] = {f"union_of_{n}": union(ours, n) for n in (4, 8)}
        return found

    return guarded(check)


def guarded(check: Callable[[], dict]) -> dict:
    """A check that cannot be made costs the check, not the timing."""
    try:
        return check()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


# The card, the command -----------------------------------------------------------------------------------------------


def about(settings: Settings) -> dict:
    """Where and with what the run is made."""
    name = device_name(settings.device)
    shown = asdict(settings) | {"dtype": str(settings.dtype)}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        pass
    row = {"benchmark": "msa_attention", "device": name, "versions": versions, "settings": shown}
    if settings.device.startswith("cuda"):
        card = torch.cuda.get_device_properties(settings.device)
        versions["cudnn"] = torch.backends.cudnn.version()
        row |= {"memory_bytes": card.total_memory, "multiprocessors": card.multi_processor_count}
        row["l2_bytes"] = card.L2_cache_size
        fields = "driver_version,power.limit,clocks.max.sm,clocks.sm,temperature.gpu"
        row["driver_power_clocks"] = output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    row["commit"] = output_of("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")
    row["started"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return row


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{platform.machine()} CPU"


def output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default=",".join(WHATS), help="sections, in the order they run")
    parser.add_argument("--backends", default="triton,torch", help="ours")
    parser.add_argument("--data", default="random,clustered")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, fewer repetitions")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no measurement after so many")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--resume", action="store_true", help="keep what --output holds, and measure the rest")
    parser.add_argument("--output", type=Path, help="default: results/msa_attention_CARD.json (or _quick)")
    args = parser.parse_args()
    what = tuple(args.what.split(","))
    for name in what:
        if name not in WHATS:
            parser.error(f"--what {name}: must be among {', '.join(WHATS)}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no GPU that PyTorch can use here")
    settings = Settings(
        device=args.device, what=what, backends=tuple(args.backends.split(",")), data=tuple(args.data.split(",")),
        **(QUICK if args.quick else {}), seconds=args.seconds,
    )  # fmt: skip
    card = re.sub(r"\W+", "_", device_name(args.device).lower())
    output = args.output or RESULTS / f"msa_attention_{card}{'_quick' if args.quick else ''}.json"
    try:
        Bench(settings, output, args.resume).run()
    except DeviceLost as error:
        print(f"the GPU is lost to this process: {error}; go on with --resume", file=sys.stderr)
        os._exit(3)  # a broken context would hang or crash the ordinary way out
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
