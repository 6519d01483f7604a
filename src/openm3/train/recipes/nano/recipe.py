"""openm3-nano from nothing: one file says what is trained, on what, for how long. `openm3 train nano [--run NAME]`.

    bundled   the model in the package: MSA with dense warm-up, the longest schedule
    pt        the same on the comparison's shorter schedule: MSA from scratch (the report's MSA-PT)
    full      dense attention throughout, on that schedule (Full)
    cpt       full's weights from before its decay, converted by warm-up and sparse continuation (MSA-CPT)

The last three see the same number of tokens, and pt and full the same batches. Runs go on where they were stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from openm3.config import M3Config
from openm3.train.recipes.nano.source import NanoSource
from openm3.train.schedule import TrainConfig

if TYPE_CHECKING:
    from openm3.model import M3

TOKENS = 65_536  # of a batch
SHARES = {"growth": 0.15, "warmup": 0.10, "branch": 0.65, "decay": 0.25}  # of a run's steps
SHARD_BYTES = 15_000_000  # a file of the bundled weights stays under 16 MB
BRANCH = "before-decay"  # where `full` leaves its weights for `cpt`


@dataclass(frozen=True)
class Run:
    """One run: its schedule, where its batches begin, how documents grow, the run whose weights it starts from."""

    config: TrainConfig
    grow: int
    first: int = 0
    start: str | None = None
    stop_at: int | None = None  # a step after which the weights are kept under BRANCH

    def source(self) -> NanoSource:
        return NanoSource(seed=self.config.seed, tokens_per_batch=TOKENS, grow=self.grow, first=self.first)


def plan(name: str, steps: int | None = None) -> Run:
    """The run of that name, on a schedule of `steps` (default 3,600 for bundled, 800 for the three compared ones).

    Raises ValueError for another name."""
    if name not in ("bundled", "pt", "full", "cpt"):
        raise ValueError(f"run {name!r}: must be bundled, pt, full or cpt")
    n = steps or (3_600 if name == "bundled" else 800)
    growth, warmup, branch = (max(1, round(SHARES[key] * n)) for key in ("growth", "warmup", "branch"))
    base = TrainConfig(
        steps=n, tokens_per_batch=TOKENS, optimizer="muon", lr=3e-3, weight_decay=0.05, clip=1.0,
        schedule="wsd", warmup_steps=min(200, n), decay_fraction=SHARES["decay"],
        precision="bf16", compile=True, attention="msa", warmup_msa_steps=warmup, index_loss_weight=1.0,
        index_queries=512, router_bias_rate=2e-3, router_aux_weight=1e-2, seed=1, log_every=20,
        save_every=max(1, n // 4), eval_every=max(1, n // 8),
        workers=min(14, os.cpu_count() or 1), prefetch=4,
    )  # fmt: skip
    if name == "full":
        return Run(replace(base, attention="dense", warmup_msa_steps=0), growth, stop_at=branch)
    if name == "cpt":
        rest = n - branch
        config = replace(base, steps=rest, warmup_steps=min(50, rest), warmup_msa_steps=round(rest * 0.3),
                         decay_fraction=min(1.0, SHARES["decay"] * n / rest))  # fmt: skip
        return Run(config, grow=0, first=branch, start="full")
    return Run(base, growth)


def run(
    name: str = "bundled",
    *,
    runs_dir: Path | str = "runs/nano",
    steps: int | None = None,
    resume: bool = False,
    device: str | None = None,
    until: int | None = None,
    max_seconds: float | None = None,
    weights: Path | str | None = None,
) -> Path:
    """Trains one run in `runs_dir/name` and writes its checkpoint to `weights` (default `runs_dir/name/model`).

    resume: go on with the run that is there. Returns the checkpoint's directory. Raises ValueError for a directory that
    holds a run already (without resume), and for `cpt` before `full` has come to its branch.
    """
    import torch

    from openm3.train.trainer import Trainer

    what, run_dir = plan(name, steps), Path(runs_dir) / name
    if (run_dir / "metrics.jsonl").exists() and not resume:
        raise ValueError(f"{run_dir}: holds a run already; resume it (--resume) or name another directory")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = what.config if device != "cpu" else replace(what.config, precision="fp32", compile=False)
    model = fresh_model(config.seed, device) if what.start is None else branched(Path(runs_dir) / what.start, device)
    trainer = Trainer(model, what.source(), config, run_dir, evaluate=held_out_losses(config))
    kept = run_dir / BRANCH
    if what.stop_at is not None and not kept.exists():
        outcome = trainer.train(until=min(what.stop_at, until or what.stop_at), max_seconds=max_seconds)
        if outcome.step < what.stop_at:
            return run_dir
        save(model, kept)
    outcome = trainer.train(until=until, max_seconds=max_seconds)
    if outcome.reason != "done":
        return run_dir
    final = model if config.attention == "msa" else without_index(model)
    return save(final, Path(weights) if weights else run_dir / "model")


def fresh_model(seed: int, device: str) -> M3:
    import torch

    from openm3.model import M3

    torch.manual_seed(seed)
    return M3(M3Config.preset("nano")).to(device)


def branched(directory: Path, device: str) -> M3:
    """The weights that `full` left before its learning rate fell."""
    import torch

    from openm3.checkpoint import load_model

    if not (directory / BRANCH).exists():
        raise ValueError(f"{directory / BRANCH}: no such directory; train the run `full` first, past its branch")
    return load_model(directory / BRANCH, device=device, dtype=torch.float32)


def without_index(model: M3) -> M3:
    """The same network as one that attends densely in every layer, also when it answers."""
    from openm3.model import M3

    text = replace(model.config.text, sparse_layers=(False,) * model.config.text.num_hidden_layers)
    dense = M3(replace(model.config, text=text), device=next(model.parameters()).device)
    kept = dense.state_dict().keys()
    dense.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in kept})
    return dense


def save(model: M3, directory: Path) -> Path:
    """A complete checkpoint in bf16: weights in shards, tokenizer, template."""
    import torch

    from openm3.checkpoint import save_model
    from openm3.train.recipes.nano.tokenizer import FILE

    save_model(model, directory, dtype=torch.bfloat16, max_shard_bytes=SHARD_BYTES, extra_files_from=FILE.parent)
    return directory


def held_out_losses(config: TrainConfig, batches: int = 2) -> Callable[[M3, int], dict[str, float]]:
    """An `evaluate` for the trainer: the mean loss over fixed held-out cases of each larger task, and of all."""
    from openm3.train.losses import mean_loss

    names = ("pictures", "digits", "clips", "retrieval", "arithmetic", "tools", "dialogue", "document")
    sets = {name: NanoSource(0, TOKENS, mix={name: 1.0}, split="test") for name in names}
    made: dict[str, list] = {}

    def evaluate(model: M3, step: int) -> dict[str, float]:
        for name, source in sets.items():
            if name not in made:
                made[name] = [source.batch(i) for i in range(batches)]
        msa = "dense" if config.attention == "dense" else "infer"
        losses = {name: mean_loss(model, made[name], msa=msa, autocast=config.precision == "bf16") for name in sets}
        return losses | {"loss": sum(losses.values()) / len(losses)}

    return evaluate
