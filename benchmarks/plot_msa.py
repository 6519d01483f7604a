"""Draws what `msa_attention.py` measured: compute a token, and the speed-up over dense attention, against the context.

    python benchmarks/plot_msa.py benchmarks/results/msa_attention_CARD.json [--output FILE.svg]

Attention only, of one sparse layer and of all of M3's 60 (57 sparse and 3 dense, all with our kernels). The baseline
is dense grouped-query attention in every layer, by the fastest implementation of that run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from msa_sides import DENSE, Geometry

SPARSE_LAYERS, DENSE_LAYERS = 57, 3
LAYERS = SPARSE_LAYERS + DENSE_LAYERS
COLOURS = {"gqa": "#8a8f98", "layer": "#1f6feb", "model": "#e36209"}


def records(measured: dict, sides: Iterable[str], **fields: object) -> list[dict]:
    """What was measured of some sides; failures left out."""
    return [
        row for row in measured["results"]
        if "error" not in row and row["side"] in sides and all(row.get(key) == value for key, value in fields.items())
    ]  # fmt: skip


def best(measured: dict, sides: Iterable[str], **fields: object) -> float | None:
    """The fastest side's ms, None where nobody was measured."""
    return min((row["total_ms"] for row in records(measured, sides, **fields)), default=None)


def prompt_ms(measured: dict, side: str, what: str, length: int, **fields: object) -> float | None:
    """A whole prompt out of chunks measured at some ends of contexts, straight lines between them.

    Where the prompt is no longer than the longest of them; a chunk before the first one is taken for proportionally
    cheaper, which it is not quite.
    """
    chunk = measured["settings"]["chunk"]
    points = sorted((row["context"], row["total_ms"]) for row in records(measured, (side,), what=what, **fields))
    if not points or points[-1][0] < length:
        return None
    ends, ms = zip((chunk / 2, 0.0), *points)
    return float(np.interp(range(chunk, length + 1, chunk), ends, ms).sum())


def fastest(*candidates: float | None) -> float | None:
    return min((ms for ms in candidates if ms is not None), default=None)


def speedups(data: dict, kind: str = "random") -> dict[str, dict]:
    """{"prefill": {length: row}, "decode": {(batch, context): row}}, a row the ratios `layer` and `model` (None where
    no dense attention of ours was measured) and the ms they are made of."""
    ours = data["settings"]["backends"]
    everyone, found = (*DENSE, *ours), {"prefill": {}, "decode": {}}
    for length in data["settings"]["prompts"]:
        walked = [row["sums"].get(str(length)) for row in records(data, ours, what="prompts", data=kind)]
        chunks = [prompt_ms(data, side, "prefill", length, data=kind) for side in ours]
        sparse = fastest(*(row["total_ms"] for row in walked if row)) or fastest(*chunks)
        dense = {side: prompt_ms(data, side, "dense prefill", length) for side in everyone}
        own = fastest(*(dense[side] for side in ours))
        found["prefill"] |= _ratios(length, sparse, fastest(*dense.values()), own)
    for batch, context in data["settings"]["steps"]:
        at = dict(batch=batch, context=context)
        sparse = best(data, ours, what="decode", **at)
        dense, own = (best(data, sides, what="dense decode", **at) for sides in (everyone, ours))
        found["decode"] |= _ratios((batch, context), sparse, dense, own)
    return found


def _ratios(key: object, sparse: float | None, dense: float | None, own: float | None) -> dict:
    if sparse is None or dense is None:
        return {}
    model = None if own is None else LAYERS * dense / (SPARSE_LAYERS * sparse + DENSE_LAYERS * own)
    return {key: {"layer": dense / sparse, "model": model, "sparse_ms": sparse, "dense_ms": dense}}


def compute(geometry: Geometry, length: int) -> dict[str, float]:
    """GFLOP of attention a token and layer, mean over a prompt: dense, a sparse layer, the mean of M3's layers."""
    dense = geometry.dense_flops(0, length)
    sparse = geometry.select_flops(0, length) + geometry.attend_flops(0, length)
    mean = (SPARSE_LAYERS * sparse + DENSE_LAYERS * dense) / LAYERS
    return {name: flops / length / 1e9 for name, flops in (("gqa", dense), ("layer", sparse), ("model", mean))}


def short(tokens: int) -> str:
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}K" if tokens >= 1 << 10 else str(tokens)


def draw(data: dict, output: Path, kind: str = "random") -> None:
    """Three panels, written in the format that the file's name asks for."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.9), layout="constrained", dpi=150)
    flops, prefill, decode = figure.subplots(1, 3)
    geometry = Geometry(**data["settings"]["geometry"])
    rows = {length: compute(geometry, length) for length in sorted(data["settings"]["prompts"])}
    names = {"gqa": "dense GQA", "layer": "MSA, a sparse layer", "model": f"MSA, mean of {LAYERS} layers"}
    for name, label in names.items():
        flops.plot(list(rows), [row[name] for row in rows.values()], "o-", color=COLOURS[name], label=label)
    flops.set(title="compute a token, mean over a prompt", ylabel="GFLOP a layer", yscale="log")
    measured = speedups(data, kind)
    _curves(prefill, measured["prefill"])
    prefill.set(title="whole prompts", ylabel="times as fast as dense GQA")
    alone = {context: row for (batch, context), row in sorted(measured["decode"].items()) if batch == 1}
    _curves(decode, alone)
    for (batch, context), row in measured["decode"].items():
        if batch > 1:
            decode.plot([context], [row["layer"]], "s", color=COLOURS["layer"], fillstyle="none")
            at = (context, row["layer"])
            decode.annotate(f"batch {batch}", at, (0, 6), textcoords="offset points", fontsize=7, ha="center")
    decode.set(title="decode, batch 1", ylabel="times as fast as dense GQA")
    for axis in (flops, prefill, decode):
        lengths = sorted({int(x) for artist in axis.lines for x in artist.get_xdata()})
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [short(n) for n in lengths])
        axis.minorticks_off()
        axis.set_xlabel("context")
        axis.grid(alpha=0.25)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, loc="upper left")
    for axis in (prefill, decode):
        axis.set_ylim(0, 1.2 * axis.dataLim.y1 if axis.lines else 1)
    figure.suptitle(f"Attention of M3 with openm3's kernels, bf16, {data['device']}", fontsize=11)
    with matplotlib.rc_context({"svg.hashsalt": "openm3"}):
        figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)


def _curves(axis, rows: dict[int, dict]) -> None:
    for name, label in (("layer", "a sparse layer"), ("model", f"all {LAYERS} layers")):
        points = [(n, row[name]) for n, row in sorted(rows.items()) if row[name] is not None]
        if points:
            axis.plot(*zip(*points), "o-", color=COLOURS[name], label=label)
            axis.annotate(
                f"{points[-1][1]:.1f}×", points[-1], (-4, 5), textcoords="offset points", fontsize=8, ha="right"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--data", default="random", choices=("random", "clustered"), help="of the prompts")
    parser.add_argument("--output", type=Path, help="default: the results' name with .svg")
    args = parser.parse_args()
    data = json.loads(args.results.read_text())
    output = args.output or args.results.with_suffix(".svg")
    draw(data, output, args.data)
    for what, rows in speedups(data, args.data).items():
        for key, row in rows.items():
            model = "" if row["model"] is None else f", all layers {row['model']:.1f}x"
            ms = f"{row['sparse_ms']:.4g} ms for {row['dense_ms']:.4g} ms"
            print(f"{what} {key}: a sparse layer {row['layer']:.1f}x ({ms}){model}")
    print(output)


if __name__ == "__main__":
    main()
