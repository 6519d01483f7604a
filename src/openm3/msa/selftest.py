"""Whether this machine computes MSA rightly: every backend that can run here, held against the definition.

    python -m openm3.msa.selftest [--backend NAME] [--device cpu|cuda] [--json FILE]

The reference computes in float64 on the same inputs. Selection is compared bit by bit on integers, where sums are exact
in every order; the rest by its largest error relative to the largest value. Exit code 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from openm3.msa import (
    BACKENDS,
    Plan,
    dense_attention,
    dispatch,
    index_error,
    index_loss,
    select_blocks,
    sparse_attention,
)

FP8 = torch.float8_e4m3fn
OUTPUT = {torch.float32: 1e-5, torch.bfloat16: 5e-3, FP8: 1e-5}
GRADIENT = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", FP8: "fp8"}
TF32 = 2e-3  # what PyTorch's own GPU kernels may round float32 products to


@dataclass(frozen=True)
class Problem:
    """Lengths, heads and sizes of a selection, and the tensors that `draw` gives for them."""

    name: str
    lens_q: tuple[int, ...]
    lens_k: tuple[int, ...]
    hq: int
    hkv: int
    hi: int
    d: int
    block: int
    topk: int
    local: int = 1
    init: int = 0

    def draw(self, device: str, dtype: torch.dtype, integers: bool = False) -> Inputs:
        generator = torch.Generator().manual_seed(len(self.name))
        t, n = sum(self.lens_q), sum(self.lens_k)
        shapes = ((t, self.hi, self.d), (n, self.d), (t, self.hq, self.d), (n, self.hkv, self.d), (n, self.hkv, self.d))

        def one(shape: tuple[int, ...]) -> Tensor:
            if integers:
                return torch.randint(-2, 3, shape, generator=generator).to(device, dtype)
            return torch.randn(shape, generator=generator).to(device, dtype)

        return Inputs(*map(one, shapes))

    def plan(self, device: str, paged: bool) -> Plan:
        sizes = dict(block_size=self.block, topk=self.topk, local_blocks=self.local, init_blocks=self.init)
        offsets = [0, *accumulate(self.lens_q)]
        if paged:
            return Plan.paged(self.table().to(device), self.lens_k, offsets, **sizes)
        return Plan.packed(offsets, [0, *accumulate(self.lens_k)], device=device, **sizes)

    def table(self) -> Tensor:
        """int32 [B, max_pages]: the sequences' pages, all over the cache; page 0 is nobody's."""
        counts = [-(-n // self.block) for n in self.lens_k]
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)) + 1
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for row, pages in zip(table, order.split(counts)):
            row[: len(pages)] = pages
        return table

    def in_pages(self, x: Tensor) -> Tensor:
        """Packed keys [N, H, D] -> pages [P, H, block, D], zeros where no key lies."""
        table = self.table()
        pages = x.new_zeros(int(table.max()) + 1, self.block, *x.shape[1:])
        for s, keys in enumerate(x.split(list(self.lens_k))):
            for b, piece in enumerate(keys.split(self.block)):
                pages[table[s, b], : len(piece)] = piece
        return pages.transpose(1, 2)


@dataclass(frozen=True)
class Inputs:
    """index_q [T, Hi, D], index_k, q, k, v; keys packed, or in pages."""

    index_q: Tensor
    index_k: Tensor
    q: Tensor
    k: Tensor
    v: Tensor

    def map(self, change: Callable[[Tensor], Tensor], *names: str) -> Inputs:
        return replace(self, **{name: change(getattr(self, name)) for name in names or self.__dataclass_fields__})


SMALL = dict(hq=6, hkv=2, hi=2, d=64, block=16, topk=4)
M3 = dict(hq=64, hkv=4, hi=4, d=128, block=128, topk=16)
PROBLEMS = (
    Problem("whole", (257, 16, 1, 64), (257, 16, 1, 64), **SMALL),
    Problem("chunk", (48, 3, 17), (203, 300, 17), **SMALL | dict(topk=6, local=2, init=1)),
    Problem("decode", (1, 1, 1, 1), (400, 17, 1, 256), **SMALL),
    Problem("M3 chunk", (72,), (2300,), **M3),
    Problem("M3 decode", (1, 1), (2900, 300), **M3),
)
# Long enough for a scan in fp8 to be worth it; its selection only.
LONG = Problem("M3 long decode", (1,), (70_000,), **M3 | dict(hq=1, hkv=1))


@dataclass(frozen=True)
class Row:
    """One line of the table. `error` None: it did not run, `note` says why; a tolerance of 0 asks for equal bits."""

    backend: str
    check: str
    problem: str
    error: float | None
    tolerance: float
    note: str = ""
    failed: bool = False
    seconds: float = 0.0


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest error relative to the largest value; infinite where a number is missing or at the wrong place."""
    found, wanted = found.double(), wanted.double()
    none = wanted == -torch.inf
    if found.shape != wanted.shape or found.isnan().any() or not torch.equal(found == -torch.inf, none):
        return torch.inf
    gap = (found - wanted).masked_fill(none, 0.0).abs().amax()
    return float(gap / wanted.masked_fill(none, 0.0).abs().amax().clamp_min(1e-30))


def selection(problem: Problem, backend: str, device: str, dtype: torch.dtype, paged: bool) -> float:
    """How many entries of the blocks and their scores differ, on integers."""
    t, plan = problem.draw(device, dtype, integers=True), problem.plan(device, paged)
    if paged:
        t = t.map(lambda k: problem.in_pages(k[:, None])[:, 0], "index_k")
    wanted, values = select_blocks(t.index_q, t.index_k, plan, return_scores=True, backend="reference")
    found, scores = select_blocks(t.index_q, t.index_k, plan, return_scores=True, backend=backend)
    alone = select_blocks(t.index_q, t.index_k, plan, backend=backend)
    return float((found != wanted).sum() + (scores != values).sum() + (alone != wanted).sum())


def exact_selection(problem: Problem, backend: str, device: str) -> float:
    """The same from fp8 pages with the bf16 ones beside them, on integers that fp8 rounds."""
    t, plan = problem.draw(device, torch.bfloat16, integers=True), problem.plan(device, paged=True)
    t = t.map(lambda k: problem.in_pages((31 * k + k.roll(1, -1))[:, None])[:, 0], "index_k")
    scale = t.index_k.float().abs().amax((1, 2)).clamp_min(1.0) / 448
    keys = (t.index_k / scale[:, None, None]).to(FP8)
    copies = dict(
        index_k_scale=scale, index_k_exact=t.index_k, index_k_error=index_error(t.index_k, keys, scale)
    )  # fmt: skip
    wanted, values = select_blocks(t.index_q, t.index_k, plan, return_scores=True, backend="reference")
    found, scores = select_blocks(t.index_q, keys, plan, return_scores=True, backend=backend, **copies)
    return float((found != wanted).sum() + (scores != values).sum())


def _blocks(problem: Problem, t: Inputs, device: str) -> Tensor:
    return select_blocks(t.index_q, t.index_k, problem.plan(device, paged=False), backend="reference")


def attention(problem: Problem, backend: str, device: str, dtype: torch.dtype, paged: bool, sparse: bool) -> float:
    """Error of the output, or of the log-sum-exp if that is larger. fp8: keys and values, with a scale each page."""
    t, plan = problem.draw(device, torch.float32 if dtype == FP8 else dtype), problem.plan(device, paged)
    blocks, scales = _blocks(problem, t, device), {}
    if paged:
        t = t.map(problem.in_pages, "k", "v")
    exact = t.map(Tensor.double)
    if dtype == FP8:
        scale = torch.rand(t.k.shape[:2], generator=torch.Generator().manual_seed(1)).to(device) + 0.5
        t = t.map(lambda x: x.to(FP8), "k", "v")
        exact = replace(exact, k=t.k.double() * scale[..., None, None], v=t.v.double() * 0.5)
        scales = dict(k_scale=scale, v_scale=0.5)

    def attend(x: Inputs, name: str, **more) -> tuple[Tensor, Tensor]:
        if sparse:
            return sparse_attention(x.q, x.k, x.v, blocks, plan, return_lse=True, backend=name, **more)
        return dense_attention(x.q, x.k, x.v, plan, return_lse=True, backend=name, **more)

    with torch.no_grad():
        wanted, wanted_lse = attend(exact, "reference")
        out, lse = attend(t, backend, **scales)
    return max(relative(out, wanted), relative(lse, wanted_lse))


def gradient(problem: Problem, backend: str, device: str, dtype: torch.dtype, sparse: bool) -> float:
    """Error of the gradients of q, k and v."""
    t, plan = problem.draw(device, dtype), problem.plan(device, paged=False)
    blocks = _blocks(problem, t, device) if sparse else None
    upstream = torch.randn(t.q.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def gradients(x: Inputs, name: str) -> tuple[Tensor, ...]:
        inputs = [y.requires_grad_() for y in (x.q, x.k, x.v)]
        if sparse:
            out = sparse_attention(*inputs, blocks, plan, backend=name)
        else:
            out = dense_attention(*inputs, plan, backend=name)
        return torch.autograd.grad(out, inputs, upstream.to(out.dtype))

    return max(map(relative, gradients(t, backend), gradients(t.map(Tensor.double), "reference")))


def loss(problem: Problem, backend: str, device: str, dtype: torch.dtype, sparse: bool) -> float:
    """Error of the index loss and its gradients of the index queries and keys."""
    t, plan = problem.draw(device, dtype), problem.plan(device, paged=False)
    blocks = _blocks(problem, t, device) if sparse else None

    def results(x: Inputs, name: str) -> tuple[Tensor, ...]:
        inputs = [y.requires_grad_() for y in (x.index_q, x.index_k)]
        value = index_loss(*inputs, x.q, x.k, blocks, plan, backend=name)
        return value.detach(), *torch.autograd.grad(value, inputs)

    return max(map(relative, results(t, backend), results(t.map(Tensor.double), "reference")))


def checks(backend: str, device: str) -> Iterator[tuple[str, Problem, float, Callable[[], float]]]:
    """(what, on which problem, the tolerance, the check), the quickest first."""
    rounds = backend == "torch" and device == "cuda"
    for problem in PROBLEMS:
        args = (problem, backend, device)
        for paged in (False, True):
            where = "pages" if paged else "packed"
            for dtype in (torch.float32, torch.bfloat16):
                yield (
                    f"selection, {where}, {SHORT[dtype]}", problem, 0.0,
                    lambda args=args, dtype=dtype, paged=paged: selection(*args, dtype, paged),
                )  # fmt: skip
            for sparse in (True, False):
                for dtype in (torch.float32, torch.bfloat16, FP8)[: 3 if paged else 2]:
                    yield (
                        f"{'sparse' if sparse else 'dense'}, {where}, {SHORT[dtype]}", problem,
                        TF32 if rounds and dtype == torch.float32 else OUTPUT[dtype],
                        lambda args=args, d=dtype, p=paged, s=sparse: attention(*args, d, p, s),
                    )  # fmt: skip
    for problem in (*PROBLEMS, LONG):
        yield (
            "selection, pages, fp8 + bf16", problem, 0.0,
            lambda args=(problem, backend, device): exact_selection(*args),
        )  # fmt: skip
    for problem in PROBLEMS[:2]:
        args = (problem, backend, device)
        for sparse in (True, False):
            kind = "sparse" if sparse else "dense"
            for dtype in (torch.float32, torch.bfloat16):
                yield (
                    f"gradient, {kind}, {SHORT[dtype]}", problem,
                    4 * TF32 if rounds and dtype == torch.float32 else GRADIENT[dtype],
                    lambda args=args, d=dtype, s=sparse: gradient(*args, d, s),
                )  # fmt: skip
            yield (
                f"index loss, {kind}, fp32", problem, 1e-4,
                lambda args=args, s=sparse: loss(*args, torch.float32, s),
            )  # fmt: skip


def _refusal(backend: str, device: str) -> str | None:
    """Why a backend can do nothing at all here: neither small packed float32 nor M3's decode in bf16 pages."""
    small, large = PROBLEMS[0].draw(device, torch.float32), PROBLEMS[-1].draw(device, torch.bfloat16)
    k, v = (PROBLEMS[-1].in_pages(x) for x in (large.k, large.v))
    refusal = dispatch.BACKENDS[backend].refusal
    with torch.no_grad():
        if refusal(small.q, small.k, PROBLEMS[0].plan(device, paged=False), small.v) is None:
            return None
        return refusal(large.q, k, PROBLEMS[-1].plan(device, paged=True), v)


def run(backend: str, device: str) -> Iterator[Row]:
    """All checks of one backend; one row that says why, where it cannot run on this machine at all."""
    reason = _refusal(backend, device)
    if backend == "triton" and device == "cpu":  # also in Triton's interpreter, which has arithmetic of its own
        reason = reason or "it needs a GPU"
    if reason is not None:
        yield Row(backend, "all", "", None, 0.0, f"cannot run here: {reason}")
        return
    for check, problem, tolerance, measure in checks(backend, device):
        row, start = Row(backend, check, problem.name, None, tolerance), time.perf_counter()
        try:
            error = measure()
            row = replace(row, error=error, failed=not error <= tolerance)
        except dispatch.Refused as refused:
            row = replace(row, note=f"cannot run here: {refused.reason}")
        except Exception as wrong:  # whatever a kernel or its compiler does is a finding, and the others are still due
            row = replace(row, note=f"{type(wrong).__name__}: {str(wrong).strip()[:300]}", failed=True)
        yield replace(row, seconds=round(time.perf_counter() - start, 3))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m openm3.msa.selftest", description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, help="only this one; by default all but the reference")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default the GPU if PyTorch sees one")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    given = parser.parse_args(argv)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    torch.set_num_threads(1)  # the products are small: threads only cost, and on a busy machine tenfold
    names = [given.backend] if given.backend else [name for name in BACKENDS if name != "reference"]
    what = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    rows = _show([(name, run(name, device)) for name in names], f"openm3.msa on {what}, torch {torch.__version__}")
    if given.json:
        found = dict(device=what, torch=torch.__version__, rows=[asdict(row) for row in rows])
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    return 1 if any(row.failed for row in rows) else 0


def _show(runs: list[tuple[str, Iterator[Row]]], title: str) -> list[Row]:
    """Prints one line for each check of each backend, that of the problem with the largest error."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console, rows = Console(), []
    for name, found in runs:
        with console.status(f"{name} ..."):
            rows.extend(found)
    worst: dict[tuple[str, str], Row] = {}
    for row in rows:
        known = worst.setdefault((row.backend, row.check), row)
        if (row.failed, row.error or 0.0) > (known.failed, known.error or 0.0):
            worst[row.backend, row.check] = row
    table = Table("backend", "check", "worst on", title=title)
    table.add_column("error", justify="right")
    table.add_column("allowed", justify="right")
    table.add_column("")
    for row in worst.values():
        error = allowed = ""
        if row.error is not None:
            exact = not row.tolerance
            error, allowed = (
                (f"{row.error:.0f} differ", "none") if exact else (f"{row.error:.1e}", f"{row.tolerance:.0e}")
            )
        verdict = "[red]FAILED[/]" if row.failed else "" if row.error is None else "[green]ok[/]"
        table.add_row(row.backend, row.check, row.problem, error, allowed, f"{verdict} {escape(row.note)}".strip())
    console.print(table)
    done, failed = sum(row.error is not None for row in rows), sum(row.failed for row in rows)
    console.print(f"{done} checks ran, {failed} failed, {sum(row.seconds for row in rows):.0f} s")
    return rows


if __name__ == "__main__":
    sys.exit(main())
