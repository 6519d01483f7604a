"""A picture of one or several runs from their metrics.jsonl: losses, index loss, router balance, learning rate."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from openm3.train.metrics import read_metrics


class PlotError(ValueError):
    """Runs that cannot be drawn."""


PANELS = (  # (title, metrics drawn, logarithmic)
    ("language loss", ("loss",), False),
    ("index loss (KL)", ("index_loss",), True),
    ("router balance: fullest and emptiest expert, as a share of the mean", ("router_max", "router_min"), False),
    ("learning rate", ("lr",), False),
)


def plot_run(run_dirs: list[Path | str], out_png: Path | str) -> None:
    """Draws the runs over one another into `out_png`: thin lines are the steps, thick ones their running mean.

    A dotted line marks where a run switches from dense warm-up to selected blocks. Dots on the loss are held-out
    losses, if the evaluation recorded a `loss`. Raises PlotError without matplotlib or records, ValueError for a
    directory that is no run.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotError("plots need matplotlib: pip install 'openm3[train]'") from None
    figure = Figure(figsize=(13, 8), layout="constrained", dpi=110)
    axes = list(figure.subplots(2, 2).flat)
    for (title, _, logarithmic), axis in zip(PANELS, axes):
        axis.set(title=title, xlabel="step", yscale="log" if logarithmic else "linear")
        axis.grid(alpha=0.25)
    for i, run_dir in enumerate(run_dirs):
        records, label = read_metrics(run_dir), Path(run_dir).name
        rows = [row for row in records if "loss" in row]
        if not rows:
            raise PlotError(f"{run_dir}: no steps recorded yet")
        for (_, names, _), axis in zip(PANELS, axes):
            for name in names:
                _draw(axis, rows, name, f"C{i}", label if name == names[0] else None)
        held_out = [(row["step"], row["eval"]["loss"]) for row in records if "loss" in row.get("eval", {})]
        if held_out:
            axes[0].plot(*zip(*held_out), "o", color=f"C{i}", markeredgecolor="black", label=f"{label}, held out")
        switch = next((b["step"] for a, b in pairwise(rows) if a["stage"] == "warmup" != b["stage"]), None)
        if switch is not None:
            for axis in axes[:2]:
                axis.axvline(switch, color=f"C{i}", linestyle=":")
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
        else:
            axis.text(0.5, 0.5, "none recorded", transform=axis.transAxes, ha="center", color="grey")
    Path(out_png).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png)


def _draw(axis, rows: list[dict[str, Any]], name: str, color: str, label: str | None) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if not points:
        return
    steps, values = zip(*points)
    axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.7)
    reach = 0 if name == "lr" else len(values) // 50
    axis.plot(steps, smoothed(values, reach), color=color, linewidth=1.7, label=label)


def smoothed(values: tuple[float, ...] | list[float], reach: int) -> list[float]:
    """The mean of each value and its neighbours up to `reach` before and after; fewer of both sides near the ends."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    n = len(values)
    near = [min(reach, i, n - 1 - i) for i in range(n)]
    return [(sums[i + r + 1] - sums[i - r]) / (2 * r + 1) for i, r in enumerate(near)]
