"""Claim: each kernel of the Hopper backend is right on this card, and its settings are the fastest of those tried here.

Every job (a kernel family) runs in a process of its own, so that a kernel that breaks its CUDA context breaks only its
job: first checks against the reference in float64 on small shapes, then times at M3's sizes, one setting of
`hopper_backend.Tuning` changed at a time. One line of JSON is appended to the output after each check and measurement.

    python benchmarks/tune_hopper.py --seconds 240                     # all jobs, sharing the time
    python benchmarks/tune_hopper.py --jobs step --seconds 60          # one of them
    python benchmarks/tune_hopper.py --jobs step --only-check

Prints the fastest setting of each size at the end. Times are medians: decode in CUDA graphs over enough copies of the
caches that none is left in the L2, prefill with events.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate, product
from pathlib import Path
from statistics import median

import torch
from msa_attention import Clock, Settings, both
from msa_sides import Case, Geometry, make_case, ours, ours_dense, quantized
from torch import Tensor

from openm3.msa import Plan, hopper_backend, reference

M3 = Geometry()
K, M = 1 << 10, 1 << 20
BACKEND, DEVICE = "hopper", "cuda"
DEFAULT = hopper_backend.TUNING


@dataclass(frozen=True)
class Job:
    """`checks` yields (what, error, tolerance). `parts(clock, size)` gives, by part, a function that returns ms, and
    the fewest bytes or the flops of that part. `variants` of the settings are tried at the first `tuned` sizes."""

    checks: Callable[[], Iterator[tuple[str, float, float]]]
    sizes: tuple[tuple, ...]
    parts: Callable[[Clock, tuple], dict[str, tuple[Callable[[], list[float]], dict[str, int]]]]
    variants: tuple[dict, ...] = ()
    tuned: int = 2


# Checks --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Random tensors on pages in random order; `integers` make all sums exact."""

    lens_q: tuple[int, ...]
    lens_k: tuple[int, ...]
    geometry: Geometry = M3
    integers: bool = False
    local: int = 1
    init: int = 0
    seed: int = 0

    def make(self) -> tuple[dict[str, Tensor], Plan]:
        g, generator = self.geometry, torch.Generator(DEVICE).manual_seed(self.seed)
        counts = [-(-n // g.block) for n in self.lens_k]
        order = torch.randperm(sum(counts), device=DEVICE, generator=generator).int()
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32, device=DEVICE)
        for row, ids in zip(table, order.split(counts)):
            row[: len(ids)] = ids
        plan = Plan.paged(
            table, self.lens_k, [0, *accumulate(self.lens_q)], block_size=g.block, topk=g.topk,
            local_blocks=self.local, init_blocks=self.init,
        )  # fmt: skip

        def draw(*shape: int) -> Tensor:
            if self.integers:
                return torch.randint(-3, 4, shape, device=DEVICE, generator=generator).bfloat16()
            return torch.randn(shape, device=DEVICE, generator=generator).bfloat16()

        t, pages = sum(self.lens_q), sum(counts)
        kv = draw(pages, g.kv_heads, g.block, 2 * g.dim)
        return dict(
            index_q=draw(t, g.index_heads, g.index_dim), index_k=draw(pages, g.block, g.index_dim),
            q=draw(t, g.heads, g.dim), k=kv[..., : g.dim], v=kv[..., g.dim :],
        ), plan  # fmt: skip


def relative(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double(), wanted.double()
    none = wanted == -torch.inf
    if found.isnan().any() or not torch.equal(found == -torch.inf, none):
        return float("inf")
    gap = (found - wanted).masked_fill(none, 0.0).abs().max()
    return float(gap / wanted.masked_fill(none, 0.0).abs().max().clamp_min(1e-30))


def check_selection(name: str, problem: Problem) -> Iterator[tuple[str, float, float]]:
    """How many entries differ, on integers, and between two runs."""
    t, plan = replace(problem, integers=True).make()
    args = (t["index_q"], t["index_k"], plan)
    wanted, scores = reference.select_blocks(*args)
    found, values = hopper_backend.select_blocks(*args)
    again, _ = hopper_backend.select_blocks(*args, None, False)
    yield f"selection, {name}", float((found != wanted).sum()), 0.0
    yield f"its scores, {name}", float((values != scores).sum()), 0.0
    yield f"without scores, {name}", float((again != wanted).sum()), 0.0


def check_attention(name: str, problem: Problem, sparse: bool = True) -> Iterator[tuple[str, float, float]]:
    t, plan = problem.make()
    blocks = reference.select_blocks(t["index_q"], t["index_k"], plan)[0] if sparse else None
    q, k, v = t["q"], t["k"], t["v"]
    wanted, wanted_lse = reference.attention(q.double(), k.double(), v.double(), blocks, plan, 0.09)
    if sparse:
        call = partial(hopper_backend.sparse_attention, q, k, v, blocks, plan, 0.09)
    else:
        call = partial(hopper_backend.dense_attention, q, k, v, plan, 0.09)
    out, lse = call()
    again, again_lse = call()
    kind = "sparse" if sparse else "dense"
    yield f"{kind}, {name}", relative(out, wanted), 5e-3
    yield f"{kind} lse, {name}", relative(lse, wanted_lse), 1e-4
    yield f"{kind} twice, {name}", float((out != again).sum() + (lse != again_lse).sum()), 0.0


def check_fp8(name: str, problem: Problem) -> Iterator[tuple[str, float, float]]:
    """fp8 pages with a scale each: selection on integers, attention against the dequantized pages."""
    fp8 = torch.float8_e4m3fn
    t, plan = replace(problem, integers=True).make()
    keys = t["index_k"].to(fp8)
    powers = 2.0 ** torch.randint(0, 4, (len(keys),), device=DEVICE)
    wanted, _ = reference.select_blocks(t["index_q"], keys, plan, powers)
    found, _ = hopper_backend.select_blocks(t["index_q"], keys, plan, powers, False)
    yield f"fp8 selection, {name}", float((found != wanted).sum()), 0.0
    t, plan = problem.make()
    k, v = t["k"].to(fp8).contiguous(), t["v"].to(fp8).contiguous()
    scale = torch.rand(k.shape[:2], device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(problem.seed)) + 0.5
    exact = [x.double() * scale.double()[..., None, None] for x in (k, v)]
    for kind, blocks in (("sparse", wanted), ("dense", None)):
        out, _ = reference.attention(t["q"].double(), *exact, blocks, plan, 0.09)
        if blocks is None:
            got, _ = hopper_backend.dense_attention(t["q"], k, v, plan, 0.09, scale, scale)
        else:
            got, _ = hopper_backend.sparse_attention(t["q"], k, v, blocks, plan, 0.09, scale, scale)
        yield f"fp8 {kind}, {name}", relative(got, out), 5e-3


def check_exact(name: str, problem: Problem) -> Iterator[tuple[str, float, float]]:
    """The selection from fp8 keys with the exact ones beside them: that of the exact ones, however short the context,
    and in a captured step whose lengths change."""
    t, plan = problem.make()
    keys = quantized(t["index_k"])
    args = (keys["index_k"], plan, keys["index_k_scale"], True, keys["index_k_exact"], keys["index_k_error"])
    hopper_backend.TUNING = replace(DEFAULT, scan_blocks=0)
    graph, found = torch.cuda.CUDAGraph(), hopper_backend.select_exactly(t["index_q"], *args)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        found = hopper_backend.select_exactly(t["index_q"], *args)
    whole = plan.positions.clone()
    for shorter in (0, 1, 127, 1000):
        plan.positions.copy_((whole - shorter).clamp_min(0))
        graph.replay()
        wanted = hopper_backend.select_blocks(t["index_q"], t["index_k"], plan)
        differ = sum(float((a != b).sum()) for a, b in zip(found, wanted))
        yield f"fp8 and exact keys, {name}, {shorter} shorter", differ, 0.0
    hopper_backend.TUNING = DEFAULT


def check_graph(problem: Problem) -> Iterator[tuple[str, float, float]]:
    """A captured step, replayed after its lengths changed on the device."""
    t, plan = replace(problem, integers=True).make()

    def step() -> tuple[Tensor, Tensor, Tensor]:
        blocks, _ = hopper_backend.select_blocks(t["index_q"], t["index_k"], plan, None, False)
        out, _ = hopper_backend.sparse_attention(t["q"], t["k"], t["v"], blocks, plan, 0.01)
        dense, _ = hopper_backend.dense_attention(t["q"], t["k"], t["v"], plan, 0.01)
        return blocks, out, dense

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        blocks, out, dense = step()
    whole = plan.positions.clone()
    exact = [t[name].double() for name in ("q", "k", "v")]
    for shorter in (0, 1, 127, 128, 1000):
        plan.positions.copy_((whole - shorter).clamp_min(0))
        graph.replay()
        torch.cuda.synchronize()
        wanted = reference.select_blocks(t["index_q"], t["index_k"], plan)[0]
        yield f"replayed {shorter} shorter: selection", float((blocks != wanted).sum()), 0.0
        for name, found, chosen in (("sparse", out, wanted), ("dense", dense, None)):
            error = relative(found, reference.attention(*exact, chosen, plan, 0.01)[0])
            yield f"replayed {shorter} shorter: {name}", error, 5e-3


def chain(*checks: Iterator) -> Iterator[tuple[str, float, float]]:
    for one in checks:
        yield from one


# Jobs ----------------------------------------------------------------------------------------------------------------


def step_checks() -> Iterator[tuple[str, float, float]]:
    shapes = {
        "one sequence": Problem((1,), (9000,)),
        "edges": Problem((1,) * 6, (1, 127, 128, 129, 2048, 2049)),
        "verification": Problem((4, 0, 16, 1), (3000, 5, 2500, 700)),
        "forced": Problem((2,), (5000,), local=2, init=3),
        "group of 8": Problem((1, 2), (4000, 300), Geometry(8, 1, index_heads=1, topk=8)),
    }
    return chain(
        *(check_selection(name, p) for name, p in shapes.items()),
        *(check_attention(name, p) for name, p in shapes.items()),
        *(check_attention(name, p, sparse=False) for name, p in shapes.items()),
        check_fp8("verification", shapes["verification"]),
        check_fp8("a chunk", Problem((300, 20), (4000, 700))),
        check_graph(Problem((1,) * 4, (3000, 1500, 65, 2000))),
    )  # fmt: skip


def rotated(batch: int, context: int, size: int, clock: Clock) -> list[Case]:
    copies = max(1, -(-clock.cold // size))
    return [make_case(M3, DEVICE, torch.bfloat16, batch, context, 1, "random", n) for n in range(copies)]


def step_parts(clock: Clock, size: tuple[int, int]) -> dict:
    select, attend = M3.select_bytes(*size), M3.attend_bytes(*size)
    calls = [ours(BACKEND, case) for case in rotated(*size, select + attend, clock)]
    chosen = [(call.attend, call.select()) for call in calls]
    return {
        "both": (lambda: clock.graph_times([partial(both, c) for c in calls]), {"bytes": select + attend}),
        "select": (lambda: clock.graph_times([c.select for c in calls]), {"bytes": select}),
        "attend": (lambda: clock.graph_times([partial(a, b) for a, b in chosen]), {"bytes": attend}),
    }


def fp8_step_parts(clock: Clock, size: tuple[int, int]) -> dict:
    """Decode from fp8 index keys; bytes: these once, and keys and values of the selected blocks."""
    select, attend = M3.select_bytes(*size, 1), M3.attend_bytes(*size)
    cases = rotated(*size, select + attend, clock)
    parts = {}
    for name, keys in (("exact", "both"), ("approximate", "fp8")):
        calls = [ours(BACKEND, case, keys) for case in cases]
        parts |= {
            f"{name}, both": (
                lambda calls=calls: clock.graph_times([partial(both, c) for c in calls]), {"bytes": select + attend},
            ),
            f"{name}, select": (
                lambda calls=calls: clock.graph_times([c.select for c in calls]), {"bytes": select},
            ),
        }  # fmt: skip
    return parts


def dense_step_parts(clock: Clock, size: tuple[int, int]) -> dict:
    total = M3.dense_bytes(*size)
    calls = [ours_dense(BACKEND, case) for case in rotated(*size, total, clock)]
    return {"dense": (lambda: clock.graph_times(calls), {"bytes": total})}


def chunk_parts(part: str, clock: Clock, size: tuple[int, int, str]) -> dict:
    """A chunk of queries at the end of its context, its selection or attention."""
    queries, context, data = size
    case = make_case(M3, DEVICE, torch.bfloat16, 1, context, queries, data)
    prefix, calls = context - queries, ours(BACKEND, case)
    if part == "select":
        call, flops = calls.select, M3.select_flops(prefix, queries)
    elif part == "attend":
        call, flops = partial(calls.attend, calls.select()), M3.attend_flops(prefix, queries)
    else:
        call, flops = ours_dense(BACKEND, case), M3.dense_flops(prefix, queries)

    def times() -> list[float]:
        call()
        return clock.times(call)

    return {part: (times, {"flops": flops})}


def chunk_problems() -> dict[str, Problem]:
    return {
        "a chunk": Problem((300,), (9000,)),
        "a whole prompt": Problem((2600,), (2600,)),
        "a mixed batch": Problem((600, 1, 40, 129), (5000, 2700, 40, 129)),
        "forced": Problem((200,), (4500,), local=2, init=3),
        "group of 8": Problem((100, 30), (4000, 1500), Geometry(8, 1, index_heads=1, topk=8)),
    }


def attend_checks() -> Iterator[tuple[str, float, float]]:
    """Each tile its own way by the limit; all gathered; all united."""
    for union in (2.5, 0, 8):
        hopper_backend.TUNING = replace(DEFAULT, union=union)
        for name, problem in chunk_problems().items():
            yield from check_attention(f"{name}, unions of up to {union} top-k", problem)
    hopper_backend.TUNING = DEFAULT


STEPS = ((1, 128 * K), (8, 128 * K), (1, M), (1, 32 * K), (64, 32 * K), (8, 512 * K))
JOBS: dict[str, Job] = {
    "step": Job(
        step_checks, STEPS, step_parts,
        (
            dict(programmatic=False), dict(score_stages=2), dict(score_waves=1, score_stages=5),
            dict(score_waves=3, score_stages=2), dict(score_warps=8), dict(pick_chunk=256), dict(pick_chunk=512),
            dict(few_keys=64, few_stages=4), dict(few_keys=64, few_stages=3, few_waves=2), dict(attend_warps=8),
        ),
    ),
    "fp8 step": Job(
        lambda: chain(
            check_exact("one sequence", Problem((1,), (70_000,))),
            check_exact("verification", Problem((4, 0, 16, 1), (3000, 5, 2500, 20_000))),
            check_exact("forced", Problem((2,), (9000,), local=2, init=3)),
        ),
        ((1, M), (1, 128 * K), (8, 512 * K)), fp8_step_parts,
        (
            dict(programmatic=False), dict(score_stages=2), dict(score_stages=4), dict(narrow_waves=2),
            dict(narrow_waves=4), dict(score_warps=8), dict(narrow_waves=2, score_warps=8),
        ),
    ),
    "select": Job(
        lambda: chain(*(check_selection(name, p) for name, p in chunk_problems().items())),
        tuple((8 * K, end, "random") for end in (128 * K, M, 32 * K, 512 * K)), partial(chunk_parts, "select"),
        (*(dict(tile_blocks=n) for n in (16, 32, 128, 256)), dict(tile_stages=3), dict(tile_stages=5)),
    ),
    "attend": Job(
        attend_checks,
        ((8 * K, 128 * K, "random"), (8 * K, 128 * K, "clustered"), (8 * K, M, "random"), (8 * K, 32 * K, "random")),
        partial(chunk_parts, "attend"),
        (
            dict(page_window=1024), dict(page_window=4096), dict(join_heads=4), dict(join_warps=2), dict(join_warps=8),
            dict(union=1.5), dict(union=2), dict(union=4), dict(union=8),
        ),
    ),
    "dense": Job(
        lambda: chain(*(check_attention(name, p, sparse=False) for name, p in chunk_problems().items())),
        ((8 * K, 128 * K, "random"), (8 * K, 8 * K, "random")), partial(chunk_parts, "dense"),
    ),
    "dense step": Job(
        lambda: check_attention("one sequence", Problem((1,), (20000,)), sparse=False), ((1, 128 * K), (1, M)),
        dense_step_parts,
        (
            dict(few_keys=64, few_stages=3, few_waves=2), dict(few_keys=64, few_stages=5), dict(attend_warps=8),
        ),
    ),
}  # fmt: skip


# One job, in this process --------------------------------------------------------------------------------------------


def run_job(name: str, output: Path, seconds: float, only_check: bool) -> None:
    job, deadline = JOBS[name], time.monotonic() + seconds

    def write(**record: object) -> None:
        line = json.dumps({"job": name} | record)
        with output.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def tried(work: Callable[[], None], **record: object) -> None:
        try:
            work()
        except Exception as error:
            write(**record, error=f"{type(error).__name__}: {error}"[:500])
            torch.cuda.synchronize()  # a context that is gone ends the job here

    def check() -> None:
        for what, error, tolerance in job.checks():
            write(check=what, difference=error, allowed=tolerance, ok=error <= tolerance)

    with torch.no_grad():
        tried(check, check="all")
        clock = Clock(Settings(budget_ms=30.0, repeats=(3, 20)))
        # The settings as they are at every size, then the others: each is a compilation, and few sizes tell enough.
        rounds = [(size, ({},)) for size in job.sizes] + [(size, job.variants) for size in job.sizes[: job.tuned]]
        for size, variants in () if only_check else rounds:
            parts = job.parts(clock, size) if variants and time.monotonic() < deadline else {}
            for variant, (part, (times, amount)) in product(variants, parts.items()):
                hopper_backend.TUNING = replace(DEFAULT, **variant)
                if time.monotonic() < deadline:
                    tried(partial(measure, times, amount, write, part, size, variant), part=part, size=size)
            hopper_backend.TUNING = DEFAULT
            del parts
            torch.cuda.empty_cache()
    if time.monotonic() > deadline:
        write(stopped=f"the {seconds:.0f} seconds are over")


def measure(times: Callable, amount: dict[str, int], write: Callable, part: str, size: tuple, variant: dict) -> None:
    found = times()
    ms = median(found)
    rates = {"bytes": ("gb_s", 1e6), "flops": ("tflops", 1e9)}
    shown = {unit: round(amount[kind] / ms / scale, 1) for kind, (unit, scale) in rates.items() if kind in amount}
    write(part=part, size=size, variant=variant, ms=ms, min_ms=min(found), **shown)


# All jobs, each in its process ---------------------------------------------------------------------------------------


def summary(records: list[dict]) -> Iterator[str]:
    for name in JOBS:
        mine = [r for r in records if r.get("job") == name]
        checks = [r for r in mine if "ok" in r]
        wrong = [f"{r['check']} ({r['difference']:.3g})" for r in checks if not r["ok"]]
        wrong += [r["error"] for r in mine if "error" in r]
        if mine:
            yield f"{name}: {len(checks)} checks, " + ("; ".join(wrong)[:2000] if wrong else "none failed")
        timed = [r for r in mine if "ms" in r]
        for part, size in dict.fromkeys((r["part"], tuple(r["size"])) for r in timed):
            rows = [r for r in timed if (r["part"], tuple(r["size"])) == (part, size)]
            best, first = min(rows, key=lambda r: r["ms"]), next((r for r in rows if not r["variant"]), rows[0])
            rate = next((f"{best[unit]:.0f} {unit}" for unit in ("gb_s", "tflops") if unit in best), "")
            yield f"  {part} {size}: {first['ms']:.4g} ms, best {best['ms']:.4g} ms ({rate}) with {best['variant']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default=",".join(JOBS), help="which, in the order they run")
    parser.add_argument("--seconds", type=float, default=240.0, help="for all jobs together")
    parser.add_argument("--only-check", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("tune_hopper.jsonl"))
    parser.add_argument("--here", metavar="JOB", help="run this job in this process")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU that PyTorch can use here")
    if given.here:
        run_job(given.here, given.output, given.seconds, given.only_check)
        return 0
    names, deadline = given.jobs.split(","), time.monotonic() + given.seconds
    for name in names:
        if name not in JOBS:
            parser.error(f"--jobs {name}: must be among {', '.join(JOBS)}")
    about = dict(device=torch.cuda.get_device_name(), torch=torch.__version__, defaults=asdict(DEFAULT))
    given.output.write_text(json.dumps(about) + "\n")
    for i, name in enumerate(names):
        share = max(5.0, (deadline - time.monotonic()) / (len(names) - i))
        command = [sys.executable, __file__, "--here", name, "--seconds", str(share), "--output", str(given.output)]
        command += ["--only-check"] * given.only_check
        try:
            subprocess.run(command, timeout=share + 30, check=False, env=dict(os.environ, PYTHONUNBUFFERED="1"))
        except subprocess.TimeoutExpired:
            with given.output.open("a") as file:
                file.write(json.dumps({"job": name, "error": f"ended after {share + 30:.0f} s"}) + "\n")
    print("\n".join(summary([json.loads(line) for line in given.output.read_text().splitlines()])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
