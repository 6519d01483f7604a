"""Full, MSA-PT, MSA-CPT at this scale: the three runs at equal tokens, on the same held-out cases (report section 5).

Besides losses and tasks, the indexer is measured on held-out documents, per query and group: with I* the top-k blocks
by the main branch's own probability mass P_b and I the selected ones, block recall |I* & I| / |I*| and score recall,
the sum of P_b over I* & I divided by that over I*.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from openm3.train.recipes.nano import retrieval
from openm3.train.recipes.nano.evaluate import Row, device_name, engine_sizes, evaluate
from openm3.train.recipes.nano.render import to_sample

if TYPE_CHECKING:
    from openm3.model import M3

RUNS = ("full", "pt", "cpt")
NAMES = {"full": "Full", "pt": "MSA-PT", "cpt": "MSA-CPT"}


@torch.no_grad()
def recalls(model: M3, size: str = "4K", documents: int = 8, queries: int = 128) -> list[dict[str, float]]:
    """Block recall and score recall of each sparse layer, means over groups and `queries` positions of each document.

    All positions see more blocks than are selected, so that there is a choice; half of them, at most, are at the
    document's answer. size: one of retrieval.SIZES."""
    from openm3 import msa

    sparse = model.config.text.sparse
    measured: dict[int, list[tuple[float, float]]] = {}
    device = next(model.parameters()).device
    rows = torch.empty(0, dtype=torch.long)

    def hook(layer: int):
        def measure(module: Any, args: tuple) -> None:
            x, step = args[0], args[1]
            q, k, _, index_q, index_k = module.before(x, step.cos, step.sin, True)
            chosen = msa.select_blocks(index_q, index_k, step.plan)[:, rows]  # [Hi, n, topk]
            chosen = chosen.repeat_interleave(k.shape[1] // chosen.shape[0], 0)
            measured.setdefault(layer, []).append(recall(q[rows], k, rows, chosen, sparse.block_size))

        return measure

    handles = [model.layers[i].register_forward_pre_hook(hook(i))
               for i, on in enumerate(model.config.text.sparse_layers) if on]  # fmt: skip
    try:
        for number in range(documents):
            case = retrieval.sample(random.Random(f"recall {number}"), "test", size)
            sample = to_sample(case)
            answer = torch.tensor(sample.loss_mask).nonzero().squeeze(1)
            low = (sparse.topk_blocks + 1) * sparse.block_size
            generator = torch.Generator().manual_seed(number)
            anywhere = torch.randint(low, len(sample.input_ids), (queries - queries // 2,), generator=generator)
            rows = torch.cat([answer[: queries // 2] - 1, anywhere]).to(device)
            model(torch.tensor(sample.input_ids, device=device), msa="infer")
    finally:
        for handle in handles:
            handle.remove()
    means = {layer: torch.tensor(values).mean(0).tolist() for layer, values in measured.items()}
    return [{"layer": layer, "block_recall": block, "score_recall": score} for layer, (block, score) in means.items()]


def recall(q: Tensor, k: Tensor, rows: Tensor, chosen: Tensor, block: int) -> tuple[float, float]:
    """q [n, Hq, D], queries at positions rows [n]; k [N, Hkv, D], all keys; chosen int [Hkv, n, topk], -1: none."""
    n, keys = len(rows), len(k)
    heads = q.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3).float()  # [Hkv, G, n, D]
    scores = heads @ k.permute(1, 2, 0).float()[:, None] * q.shape[-1] ** -0.5  # [Hkv, G, n, N]
    hidden = torch.arange(keys, device=q.device)[None] > rows[:, None]
    p = scores.masked_fill_(hidden, -float("inf")).softmax(-1).mean(1)  # [Hkv, n, N]
    pad = -keys % block
    mass = torch.nn.functional.pad(p, (0, pad)).unflatten(-1, (-1, block)).sum(-1)  # [Hkv, n, blocks]
    best = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, mass.topk(chosen.shape[-1], -1).indices, True)
    ours = torch.zeros(*mass.shape[:2], mass.shape[2] + 1, dtype=torch.bool, device=q.device)
    ours = ours.scatter_(-1, chosen.long().where(chosen >= 0, mass.shape[2]), True)[..., :-1]
    both = best & ours
    blocks = both.sum(-1) / best.sum(-1)
    shares = (mass * both).sum(-1) / (mass * best).sum(-1)
    assert blocks.shape == (k.shape[1], n)
    return blocks.mean().item(), shares.mean().item()


def compare(runs_dir: Path | str, out: Path | str, cases: int = 2000, seed: int = 0, **engine: int) -> dict[str, Any]:
    """Examines the three trained runs and writes comparison.json, comparison.md and comparison.png into `out`.

    engine: `cache_tokens` and `max_batch_tokens` of `LLM`, by default large ones on a GPU.
    Raises ValueError for a run without a finished model."""
    dirs = {run: Path(runs_dir) / run for run in RUNS}
    for run, directory in dirs.items():
        if not (directory / "model").exists():
            raise ValueError(f"{directory / 'model'}: no such directory; train it first: openm3 train nano --run {run}")
    result = {run: examine(directory, cases, seed, **engine) for run, directory in dirs.items()}
    report(result, runs_dir, out)
    return result


def examine(directory: Path, cases: int = 2000, seed: int = 0, **engine: int) -> dict[str, Any]:
    """All that is measured of one trained run, as plain data: rows, last held-out losses, recalls, the device."""
    from openm3.engine import LLM
    from openm3.train.metrics import read_metrics

    llm = LLM(directory / "model", **(engine_sizes() | engine))
    rows = [asdict(row) for row in evaluate(llm, None, cases, seed)]
    last = [record["eval"] for record in read_metrics(directory) if "eval" in record][-1]
    indexer = recalls(llm.model) if any(llm.config.text.sparse_layers) else []
    return {"rows": rows, "losses": last, "indexer": indexer, "device": device_name(llm)}


def report(result: dict[str, Any], runs_dir: Path | str, out: Path | str) -> None:
    """Writes comparison.json, comparison.md, comparison.png and losses.png of what `examine` found of each run."""
    from openm3.train.plot import plot_run

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "comparison.md").write_text(table(result) + "\n")
    (out / "comparison.json").write_text(json.dumps(result, indent=1) + "\n")
    plot_run([Path(runs_dir) / run for run in RUNS], out / "losses.png")
    plot(result, out / "comparison.png")


def table(result: dict[str, Any]) -> str:
    """The comparison in Markdown: tasks in percent, held-out losses, the indexer's recalls (means over layers)."""
    lines = ["| | " + " | ".join(NAMES[run] for run in RUNS) + " |", "| --- |" + " ---: |" * len(RUNS)]
    for i, row in enumerate(result["full"]["rows"]):
        cells = (f"{result[run]['rows'][i]['percent']:.2f}" for run in RUNS)
        lines.append(f"| {row['name']}, % | {' | '.join(cells)} |")
    for name in result["full"]["losses"]:
        cells = (f"{result[run]['losses'][name]:.4f}" for run in RUNS)
        lines.append(f"| loss: {'mean' if name == 'loss' else name} | {' | '.join(cells)} |")
    for name in ("block_recall", "score_recall"):
        values = ([layer[name] for layer in result[run]["indexer"]] for run in RUNS)
        cells = (f"{sum(v) / len(v):.3f}" if v else "" for v in values)
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(result: dict[str, Any], out: Path) -> None:
    """Bars of the tasks with their intervals, and the indexer's recalls layer by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7), layout="constrained", dpi=110)
    tasks, indexer = figure.subplots(1, 2, width_ratios=(3, 1))
    for i, run in enumerate(RUNS):
        rows = [Row(**row) for row in result[run]["rows"]]
        places = [n + (1 - i) * 0.27 for n in range(len(rows), 0, -1)]
        sides = [[r.percent - r.low for r in rows], [r.high - r.percent for r in rows]]
        tasks.barh(places, [r.percent for r in rows], 0.25, xerr=sides, color=f"C{i}", label=NAMES[run],
                   error_kw={"elinewidth": 0.8})  # fmt: skip
        for name, style in (("block_recall", "o-"), ("score_recall", "s--")):
            layers = result[run]["indexer"]
            if layers:
                indexer.plot([x["layer"] for x in layers], [x[name] for x in layers], style, color=f"C{i}",
                             label=f"{NAMES[run]} {name.replace('_', ' ')}")  # fmt: skip
    tasks.set(yticks=range(len(rows), 0, -1), yticklabels=[r.name for r in rows], xlabel="right, %", xlim=(0, 101))
    tasks.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(RUNS), frameon=False)
    indexer.set(xlabel="layer", ylabel="recall", ylim=(0, 1), title="the indexer on 4 K documents")
    indexer.legend(fontsize=8)
    figure.savefig(out)
