"""The training loop of one device: steps that never wait for the device, exact resume, a clean stop at any time.

`train_step` is one step without the loop and without state of its own: sharded training wraps the model and divides the
batches, and calls the same function. Metrics stay on the device until, every `log_every` steps, they are read together.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openm3.train.data import Batch, BatchLoader, DataError, Source
from openm3.train.losses import balance_routers, forward, language_loss, router_biases, sample_queries
from openm3.train.metrics import Display, MetricsLog
from openm3.train.optim import build_optimizers, clip_gradients, is_index
from openm3.train.schedule import FREE_FIELDS, TrainConfig, TrainConfigError
from openm3.train.state import load_state, read_facts, save_state


class TrainingError(RuntimeError):
    """Training cannot go on: a loss or gradient that is not finite. The state saved before is intact."""


@dataclass(frozen=True)
class Outcome:
    """Where `Trainer.train` stopped and why: "done", "until", "time" (max_seconds), or a signal's name."""

    step: int
    reason: str


class Trainer:
    """Trains `model` in place on `source` and keeps everything in `run_dir`: metrics.jsonl, config.json, state/.

    If run_dir holds a state, the run goes on from there, with the same losses as one that was never interrupted; the
    config must then be the same, except for how often things are logged and saved and how batches are made.
    evaluate(model, step) -> {name: number} is called every `config.eval_every` steps and at the end, and recorded.
    Raises TrainConfigError for a config that differs from the state's, StateError for an unreadable state.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        config: TrainConfig,
        run_dir: Path | str,
        *,
        evaluate: Callable[[nn.Module, int], dict[str, float]] | None = None,
    ):
        self.model, self.source, self.config, self.evaluate = model, source, config, evaluate
        self.run_dir = Path(run_dir)
        self.device = model.device
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.optimizers = build_optimizers(model, config)
        if config.compile:
            for layer in model.layers:  # what is around the operator; the operator itself is planned on the host
                layer.before = torch.compile(layer.before, dynamic=True)
                layer.after = torch.compile(layer.after, dynamic=True)
        self._resume()

    @property
    def state_dir(self) -> Path:
        return self.run_dir / "state"

    def train(self, until: int | None = None, max_seconds: float | None = None) -> Outcome:
        """Trains to the end of the schedule, or until `until` steps are done, or `max_seconds` have passed.

        Ctrl-C and SIGTERM end it after the step at work; the state is saved in each case (a second Ctrl-C does not
        wait). Raises TrainingError at a loss or gradient that is not finite, DataError for a batch that is too long.
        """
        config, start = self.config, time.monotonic()
        target = config.steps if until is None else min(until, config.steps)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.model.train()
        recorder = _Recorder(self)
        first = self.step * config.accumulation
        pin = self.device.type == "cuda"
        with _StopSignals() as signals, recorder, BatchLoader(
            self.source, first, config.workers, config.prefetch, pin=pin
        ) as loader:  # fmt: skip
            while self.step < target:
                batches = self._next_batches(loader)
                recorder.add(train_step(self.model, self.optimizers, config, self.step, batches), batches)
                self.step += 1
                late = max_seconds is not None and time.monotonic() - start >= max_seconds
                stop = signals.received or ("time" if late else None)
                recorder.after_step(last=stop is not None or self.step == target)
                if stop is not None and self.step < target:
                    return Outcome(self.step, stop)
        return Outcome(self.step, "done" if self.step == config.steps else "until")

    def save(self) -> None:
        """Writes the state to resume from."""
        facts = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "config": self.config.to_dict()}
        save_state(self.state_dir, self.model, self.optimizers, facts)

    def _resume(self) -> None:
        facts = read_facts(self.state_dir)
        if facts is None:
            return
        ours, theirs = self.config.to_dict(), facts["config"]
        for name in ours.keys() - set(FREE_FIELDS):
            if ours[name] != theirs.get(name):
                raise TrainConfigError(
                    f"TrainConfig.{name} = {ours[name]!r}: the run in {self.run_dir} was started with "
                    f"{theirs.get(name)!r}; keep that, or train into another directory"
                )
        load_state(self.state_dir, self.model, self.optimizers)
        self.step, self.tokens, self.seconds = facts["step"], facts["tokens"], facts["seconds"]

    def _next_batches(self, loader: BatchLoader) -> list[Batch]:
        batches = [next(loader) for _ in range(self.config.accumulation)]
        for batch in batches:
            if batch.tokens > self.config.tokens_per_batch:
                raise DataError(f"a batch of {batch.tokens} tokens at step {self.step}: more than tokens_per_batch = "
                                f"{self.config.tokens_per_batch}")  # fmt: skip
        return [batch.to(self.device) for batch in batches]


def train_step(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], config: TrainConfig, step: int, batches: list[Batch]
) -> dict[str, Tensor]:
    """One optimizer step over batches sent to the model's device; returns scalars that are still there (nothing waits).

    Gradients are clipped for the index branch apart from the rest, so that its loss changes nothing else.
    """
    metrics, load = _accumulate_gradients(model, config, step, batches)
    named = list(model.named_parameters())
    for key, ours in (("grad_norm", False), ("index_grad_norm", True)):
        norm = clip_gradients([p for name, p in named if is_index(name) == ours], config.clip)
        if norm is not None:
            metrics[key] = norm
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = config.lr_at(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if load is not None:
        balance_routers(router_biases(model), load, config.router_bias_rate)
        relative = load / load.mean(dim=1, keepdim=True)
        metrics["router_max"], metrics["router_min"] = relative.max(), relative.min()
    return metrics


def _accumulate_gradients(
    model: nn.Module, config: TrainConfig, step: int, batches: list[Batch]
) -> tuple[dict[str, Tensor], Tensor | None]:
    device = model.device
    targets, tokens = sum(batch.targets for batch in batches), sum(batch.tokens for batch in batches)
    metrics: dict[str, Tensor] = {}
    load = None
    for i, batch in enumerate(batches):
        queries = sample_queries(config.seed, step * len(batches) + i, batch, config.index_queries)
        if queries is not None and device.type == "cuda":
            queries = queries.pin_memory().to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            output = forward(model, batch, msa=config.msa_at(step), index_queries=queries)
            loss = total = language_loss(model, output.hidden, batch) / max(1, targets)
        parts = {"loss": loss}
        share = batch.tokens / tokens
        for name, value, weight in (("index_loss", output.index_loss, config.index_loss_weight),
                                    ("router_aux", output.router_aux, config.router_aux_weight)):  # fmt: skip
            if value is not None:
                parts[name] = share * value.float()
                total = total + weight * parts[name] if weight else total
        total.backward()
        for name, value in parts.items():
            metrics[name] = metrics[name] + value.detach() if name in metrics else value.detach()
        if output.router_load is not None:
            load = output.router_load if load is None else load + output.router_load
    return metrics, load


class _Recorder:
    """Reads the metrics of the last steps together, checks and writes them; saves and evaluates when it is time."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.pending: list[tuple[dict[str, Any], dict[str, Tensor]]] = []

    def __enter__(self) -> _Recorder:
        trainer, config = self.trainer, self.trainer.config
        self.log = MetricsLog(trainer.run_dir, trainer.step)
        self.display = Display(config.steps, trainer.step, config.log_every)
        self.display.__enter__()
        if trainer.step:
            self.display.note(f"resuming at step {trainer.step}")
        self.clock, self.tokens_at_clock = time.monotonic(), trainer.tokens
        return self

    def __exit__(self, *_) -> None:
        self.display.__exit__()
        self.log.close()

    def add(self, metrics: dict[str, Tensor], batches: list[Batch]) -> None:
        trainer = self.trainer
        trainer.tokens += sum(batch.tokens for batch in batches)
        facts = {"step": trainer.step + 1, "stage": trainer.config.msa_at(trainer.step),
                 "lr": trainer.config.lr_at(trainer.step), "tokens": trainer.tokens,
                 "targets": sum(batch.targets for batch in batches)}  # fmt: skip
        self.pending.append((facts, metrics))

    def after_step(self, last: bool) -> None:
        trainer, config = self.trainer, self.trainer.config
        save = last or trainer.step % config.save_every == 0
        evaluate = trainer.evaluate is not None and config.eval_every > 0 and (
            trainer.step == config.steps or trainer.step % config.eval_every == 0
        )  # fmt: skip
        self.display.advance(trainer.step)
        if save or evaluate or trainer.step % config.log_every == 0:
            self._flush()
        if evaluate:
            self._evaluate()
        if save:
            trainer.save()
        if save or evaluate:
            self.clock = time.monotonic()  # their time is not training's

    def _flush(self) -> None:
        numbers = torch.stack([value.float() for _, metrics in self.pending for value in metrics.values()]).tolist()
        now = time.monotonic()  # after the device has caught up
        seconds = max(now - self.clock, 1e-9)
        self.trainer.seconds += seconds
        rate = (self.trainer.tokens - self.tokens_at_clock) / seconds
        self.clock, self.tokens_at_clock = now, self.trainer.tokens
        rows, remaining = [], iter(numbers)
        for facts, metrics in self.pending:
            row = facts | {name: next(remaining) for name in metrics}
            wrong = [name for name in metrics if not math.isfinite(row[name])]
            if wrong:
                self.log.write(rows)
                values = ", ".join(f"{name} = {row[name]}" for name in wrong)
                saved = self.trainer.state_dir
                kept = f"the state saved before is in {saved}" if saved.exists() else "no state was saved before"
                raise TrainingError(f"step {row['step']}: {values}; {kept}; try a lower lr")
            rows.append(row | {"tokens_per_second": rate, "seconds": self.trainer.seconds})
        self.pending = []
        self.log.write(rows)
        self.display.show(rows[-1])

    def _evaluate(self) -> None:
        trainer = self.trainer
        trainer.model.eval()
        result = trainer.evaluate(trainer.model, trainer.step)
        trainer.model.train()
        self.log.write([{"step": trainer.step, "eval": result}])
        self.display.note(f"step {trainer.step}  " + "  ".join(f"{k} {v:.4f}" for k, v in result.items()))


class _StopSignals:
    """Notes SIGINT and SIGTERM instead of dying of them; after the first, the second acts as usual."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, _) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *_) -> None:
        self._restore()
