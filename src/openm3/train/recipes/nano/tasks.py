"""The tasks by name: what training mixes, and what the examination asks with the bar each figure has to reach."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from openm3.train.recipes.nano import arithmetic, clips, dialogue, digits, pictures, prose, retrieval, toolcalls
from openm3.train.recipes.nano.case import Case

Sampler = Callable[[random.Random], Case]

TASKS: dict[str, Callable[..., Case]] = {  # (rng, split, ...) -> Case
    "pictures": pictures.sample, "digits": digits.sample, "clips": clips.sample, "retrieval": retrieval.sample,
    "arithmetic": arithmetic.sample, "tools": toolcalls.sample, "dialogue": dialogue.sample, "chat": dialogue.chat,
    "document": prose.document, "continue": prose.go_on, "echo": prose.echo,
}  # fmt: skip


@dataclass(frozen=True)
class Exam:
    """One row of the examination. `bar`: what the lower bound has to reach, in percent (None: shown, not required).

    scores: "answers" (each assistant turn), "all" (every turn of a case right), "digits" (each digit), "thinks" or
    "silent" (whether there was any thinking). seed: rows with the same seed and sampler see the same cases.
    """

    name: str
    sample: Sampler
    bar: float | None = None
    scores: str = "answers"
    seed: str = ""
    max_tokens: int = 96


def exams() -> list[Exam]:
    """All rows, in the order of the table. The mode is adaptive in every row whose name does not give another."""
    out = []
    given = {"split": "test", "thinking": "adaptive"}
    for kind in pictures.KINDS:
        bar = 90 if kind == "count" else 95
        sample = partial(pictures.sample, kind=kind, **given)
        out.append(Exam(f"picture: {kind}", sample, bar, seed=kind))
        if kind in ("relation", "count"):  # where adaptive thinks
            silent = partial(sample, thinking="disabled")
            out.append(Exam(f"picture: {kind}, thinking disabled", silent, seed=kind))
    out.append(Exam("handwritten digits, each digit", partial(digits.sample, **given), 93, "digits"))
    for kind, title in (("what", "what moves"), ("direction", "direction"), ("first", "what happens first")):
        out.append(Exam(f"clip: {title}", partial(clips.sample, kind=kind, **given), 92))
    for size in retrieval.SIZES:
        out.append(Exam(f"fact in {size} tokens", partial(retrieval.sample, kind=size, **given), 95))
    sums = partial(arithmetic.sample, split="test")
    for mode, bar in (("enabled", 97), ("disabled", None), ("adaptive", None)):
        sample = partial(sums, thinking=mode)
        out.append(Exam(f"arithmetic, thinking {mode}", sample, bar, seed="arithmetic", max_tokens=160))
    adaptive = partial(sums, thinking="adaptive")
    out.append(Exam("adaptive thinks: two or more carries", partial(adaptive, least=2), 90, "thinks", max_tokens=6))
    out.append(Exam("adaptive is silent: no carry", partial(adaptive, most=0), 90, "silent", max_tokens=6))
    out.append(Exam("tool: the call", partial(toolcalls.sample, kind="call", **given), 95, max_tokens=320))
    freely = partial(toolcalls.sample, kind="call", free=1.0, **given)
    out.append(Exam("tool described freely: the call", freely, max_tokens=320))
    out.append(Exam("tool: the answer", partial(toolcalls.sample, kind="answer", **given), 95))
    talk = partial(dialogue.sample, **given)
    out.append(Exam("dialogue: each answer", talk, 90, seed="dialogue"))
    out.append(Exam("dialogue: all three answers", talk, 90, "all", seed="dialogue"))
    return out
