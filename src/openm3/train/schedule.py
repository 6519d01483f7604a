"""What a run is to do: TrainConfig, checked once, and what it says for each step."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


class TrainConfigError(ValueError):
    """A training configuration that cannot be run; the message names the field, the value and what is allowed."""


CHOICES = {
    "optimizer": ("muon", "adamw"),
    "schedule": ("wsd", "cosine"),
    "precision": ("fp32", "bf16"),
    "attention": ("msa", "dense"),
}
FREE_FIELDS = ("log_every", "save_every", "eval_every", "workers", "prefetch")  # may change when a run is resumed


@dataclass(frozen=True)
class TrainConfig:
    """A run of `steps` optimizer steps of `accumulation` batches each. Raises TrainConfigError for impossible values.

    tokens_per_batch: the most tokens one batch of the source may hold.
    optimizer: "muon" (matrices by Muon, the rest by AdamW, at the same lr) or "adamw".
    schedule: "wsd" rises over warmup_steps, stays, and falls linearly over the last decay_fraction of the steps;
      "cosine" rises, then falls. Both end at lr * min_lr_ratio.
    clip: the largest global gradient norm, of the network and of the index branch separately.
    precision: "bf16" computes under autocast, with weights and optimizer in float32.
    compile: the decoder layers through torch.compile (bf16 only).
    attention: "msa": dense with the index loss over the whole prefix for the first warmup_msa_steps, then selected
      blocks; "dense": never selects, never trains the index branch.
    index_queries: positions of a batch that the index loss looks at, drawn by seed; None: all.
    router_bias_rate: the step of the bias that balances the experts; router_aux_weight: of the auxiliary loss.
    """

    steps: int
    tokens_per_batch: int
    accumulation: int = 1
    optimizer: str = "muon"
    lr: float = 2e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.95
    clip: float = 1.0
    schedule: str = "wsd"
    warmup_steps: int = 0
    decay_fraction: float = 0.2
    min_lr_ratio: float = 0.0
    precision: str = "fp32"
    compile: bool = False
    attention: str = "msa"
    warmup_msa_steps: int = 0
    index_loss_weight: float = 1.0
    index_queries: int | None = None
    router_bias_rate: float = 1e-3
    router_aux_weight: float = 0.0
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    eval_every: int = 0
    workers: int = 0
    prefetch: int = 2

    def __post_init__(self) -> None:
        self._integers(1, "steps", "tokens_per_batch", "accumulation", "log_every", "save_every", "prefetch")
        self._integers(0, "warmup_steps", "warmup_msa_steps", "seed", "eval_every", "workers")
        if self.index_queries is not None:
            self._integers(1, "index_queries")
        self._numbers("lr", "clip", low=0, open_low=True)
        self._numbers("weight_decay", "index_loss_weight", "router_bias_rate", "router_aux_weight", low=0)
        self._numbers("decay_fraction", "min_lr_ratio", low=0, high=1)
        self._numbers("momentum", low=0, high=1, open_high=True)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                self._refuse(name, f"must be one of {', '.join(allowed)}")
        if not isinstance(self.compile, bool):
            self._refuse("compile", "must be true or false")
        if self.compile and self.precision != "bf16":
            self._refuse("compile", "needs precision bf16: torch compiles no grouped product in float32")
        object.__setattr__(self, "betas", tuple(self.betas))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            self._refuse("betas", "must be two numbers of at least 0 and under 1")
        if self.warmup_steps > self.steps:
            self._refuse("warmup_steps", f"may not exceed steps = {self.steps}")

    def _integers(self, low: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                self._refuse(name, f"must be an integer of at least {low}")

    def _numbers(self, *names: str, low: float, high: float = math.inf, open_low=False, open_high=False) -> None:
        for name in names:
            value = getattr(self, name)
            ok = isinstance(value, int | float) and math.isfinite(value) and low <= value <= high
            if not ok or (open_low and value == low) or (open_high and value == high):
                bounds = f"{'over' if open_low else 'at least'} {low}"
                if high < math.inf:
                    bounds += f" and {'under' if open_high else 'at most'} {high}"
                self._refuse(name, f"must be a number, {bounds}")

    def _refuse(self, name: str, allowed: str) -> None:
        raise TrainConfigError(f"TrainConfig.{name} = {getattr(self, name)!r}: {allowed}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"betas": list(self.betas)}

    def lr_at(self, step: int) -> float:
        """The learning rate of the update number `step` (0 is the first)."""
        return self.lr * lr_factor(self, step)

    def msa_at(self, step: int) -> str:
        """The `msa` argument of M3.forward at `step`."""
        if self.attention == "dense":
            return "dense"
        return "warmup" if step < self.warmup_msa_steps else "train"


def lr_factor(config: TrainConfig, step: int) -> float:
    """Share of the peak learning rate at `step` in [0, steps); 1 between the warm-up and the decay."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        decay = max(1, round(config.decay_fraction * config.steps))
        fall = min(1.0, (config.steps - step) / decay)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * fall
