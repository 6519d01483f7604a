"""What the rooms of the engine hand to each other: a request and its sampling parameters, as plain data.

The scheduler writes a request's state, pages and tokens; the runner its media embeddings; the engine its text.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from openm3.engine.output import TextOutput


class RequestError(ValueError):
    """A request that cannot be served; the message names the value and what is possible."""


def _require(ok: bool, name: str, value: Any, allowed: str) -> None:
    if not ok:
        raise RequestError(f"{name} = {value!r}: {allowed}")


def _is_number(value: Any, kind: type = float) -> bool:
    return isinstance(value, (int, kind)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. None: the model's default, read from its generation_config.json.

    temperature 0 is greedy; top_k 0 and top_p 1 are off; the order is temperature, top_k, top_p. The same seed gives
    the same answer whatever else is in the batch (None: another answer each time). `stop` strings end the answer and
    are not part of it. max_tokens None: up to the end of the context.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | tuple[str, ...] = ()
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        def check(name: str, ok: Any, allowed: str) -> None:
            value = getattr(self, name)
            _require(value is None or ok(value), name, value, allowed)

        check("temperature", lambda v: _is_number(v) and v >= 0, "must be a number of at least 0")
        check("top_p", lambda v: _is_number(v) and 0 < v <= 1, "must be a number above 0 and at most 1")
        check("top_k", lambda v: _is_number(v, int) and v >= 0, "must be an integer of at least 0 (0: off)")
        check("seed", lambda v: _is_number(v, int), "must be an integer")
        check("max_tokens", lambda v: _is_number(v, int) and v >= 1, "must be an integer of at least 1")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        _require(all(isinstance(s, str) and s for s in stop), "stop", self.stop, "must be strings that are not empty")
        object.__setattr__(self, "stop", stop)

    def filled(self, defaults: SamplingParams) -> SamplingParams:
        """Itself with each None replaced by the default's value."""
        missing = {f.name: getattr(defaults, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) is None}
        return dataclasses.replace(self, **missing) if missing else self


@dataclass(eq=False)
class Media:
    """A prompt's pictures and clips, and which placeholder token shows which of their embeddings.

    pixels: for images and for videos, (rows [R, 1176] float32, grid_thw [n, 3] int64) or None; positions: the places
    of all placeholder tokens in the prompt, ascending; rows [M] int64: for each, its row in the embeddings of the
    images followed by those of the videos. The runner sets `embeds` [M, H], in the placeholders' order, and drops the
    pixels.
    """

    images: tuple[Tensor, Tensor] | None
    videos: tuple[Tensor, Tensor] | None
    positions: list[int]
    rows: list[int]
    embeds: Tensor | None = None


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One sequence on its way: prompt, parameters (all filled in), and what the engine has done about it so far."""

    prompt_ids: list[int]
    params: SamplingParams
    max_tokens: int
    eos_ids: frozenset[int] = frozenset()
    seed: int = 0
    media: Media | None = None
    output: TextOutput | None = None

    state: State = State.WAITING
    arrival: int = -1
    token_ids: list[int] = field(default_factory=list)  # the prompt and what was generated
    computed: int = 0  # the first tokens whose keys and values are in the pages
    pages: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # "stop", "length" or "cancelled"

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt_ids) :]

    @property
    def generated(self) -> int:
        return len(self.token_ids) - len(self.prompt_ids)
