"""The stream of training batches: a pure function of (seed, index), every kind of task in each batch from the first.

Only one thing changes along the run: how long documents may be, which grows over the first batches.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from openm3.train.data import Batch, Sample, pack
from openm3.train.recipes.nano.render import to_sample
from openm3.train.recipes.nano.retrieval import LONGEST
from openm3.train.recipes.nano.tasks import TASKS

MIX = {  # share of the tokens
    "pictures": 0.29, "digits": 0.05, "clips": 0.08, "retrieval": 0.15, "arithmetic": 0.18, "tools": 0.15,
    "dialogue": 0.05, "chat": 0.01, "document": 0.01, "continue": 0.005, "echo": 0.025,
}  # fmt: skip
TYPICAL = {  # tokens of a typical sample, measured; they turn shares of tokens into chances of a draw
    "pictures": 174, "digits": 98, "clips": 135, "retrieval": 1250, "arithmetic": 155, "tools": 526,
    "dialogue": 149, "chat": 126, "document": 104, "continue": 125, "echo": 169,
}  # fmt: skip
START = 1024  # the longest document at first


@dataclass(frozen=True)
class NanoSource:
    """`batch(index)` packs samples drawn by (seed, index) up to tokens_per_batch.

    mix: the share of each task in the tokens. grow: batches over which the longest document grows from 1 K to its full
    length (0: full length at once). split: "test" draws held-out cases. first: what is added to every index."""

    seed: int
    tokens_per_batch: int
    mix: Mapping[str, float] = field(default_factory=lambda: dict(MIX))
    grow: int = 0
    split: str = "train"
    first: int = 0

    def __post_init__(self) -> None:
        unknown = set(self.mix) - set(TASKS)
        if unknown or not self.mix or min(self.mix.values()) < 0:
            raise ValueError(f"mix {dict(self.mix)}: must give shares of {', '.join(TASKS)}")
        if self.tokens_per_batch < 2048:
            raise ValueError(f"tokens_per_batch {self.tokens_per_batch}: must be at least 2048")

    def longest(self, index: int) -> int:
        share = min(1.0, (index + 1) / self.grow) if self.grow else 1.0
        return min(round(START + (LONGEST - START) * share), self.tokens_per_batch // 2)

    def samples(self, index: int) -> list[Sample]:
        """The samples of one batch. What does not fit any more is left out, and a few shorter ones are tried."""
        index += self.first
        rng = random.Random(f"nano {self.split} {self.seed} {index}")
        names = list(self.mix)
        weights = [self.mix[name] / TYPICAL[name] for name in names]
        longest, left, misses, out = self.longest(index), self.tokens_per_batch, 0, []
        while misses < 4:
            name = rng.choices(names, weights)[0]
            limit = {"longest": longest} if name == "retrieval" else {}
            sample = to_sample(TASKS[name](rng, self.split, **limit), rng)
            if len(sample.input_ids) <= left:
                out.append(sample)
                left -= len(sample.input_ids)
            else:
                misses += 1
        return out

    def batch(self, index: int) -> Batch:
        return pack(self.samples(index), self.tokens_per_batch)
