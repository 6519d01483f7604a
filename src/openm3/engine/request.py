"""What the rooms of the engine hand to each other: a request and its sampling parameters, as plain data.

The scheduler writes a request's state, pages and tokens; the runner its media embeddings; the engine its text.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from openm3.engine.guide import Guide
    from openm3.engine.output import TextOutput
    from openm3.engine.sampler import History


class RequestError(ValueError):
    """A request that cannot be served; the message names the value and what is possible."""


class TooLongError(RequestError):
    """A request of more tokens than the model's context, the cache or a limit allows."""


def _require(ok: bool, name: str, value: Any, allowed: str) -> None:
    if not ok:
        raise RequestError(f"{name} = {value!r}: {allowed}")


def _is_number(value: Any, kind: type = float) -> bool:
    return isinstance(value, (int, kind)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. None: the model's default, read from its generation_config.json.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. The order is logit_bias, penalties, temperature,
    min_p, top_k, top_p. The same seed gives the same answer whatever else is in the batch (None: another answer each
    time); with n > 1 the first answer is the one that n = 1 gives.

    repetition_penalty divides the positive and multiplies the negative logits of all tokens in prompt and answer;
    presence_penalty and frequency_penalty are subtracted for the answer's tokens, once and as often as they occurred.
    logit_bias: numbers added to the logits of these tokens.

    `stop` strings and `stop_token_ids` end the answer and are not part of its text. max_tokens None: up to the end of
    the context. thinking_budget: after so many tokens of thinking, its end is forced.

    logprobs: for each token of the answer its log-probability, and that of the so many likeliest (0: only its own), by
    the model's logits as they are; prompt_logprobs: the same for the prompt's tokens. None: not wanted.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | tuple[str, ...] = ()
    max_tokens: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    thinking_budget: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        def check(name: str, ok: Any, allowed: str) -> None:
            value = getattr(self, name)
            _require(value is None or ok(value), name, value, allowed)

        def is_count(least: int) -> Any:
            return lambda v: _is_number(v, int) and v >= least

        check("temperature", lambda v: _is_number(v) and 0 <= v <= 100, "must be a number from 0 to 100")
        check("top_p", lambda v: _is_number(v) and 0 < v <= 1, "must be a number above 0 and at most 1")
        check("top_k", is_count(0), "must be an integer of at least 0 (0: off)")
        check("seed", lambda v: _is_number(v, int), "must be an integer")
        check("max_tokens", is_count(1), "must be an integer of at least 1")
        check("min_p", lambda v: _is_number(v) and 0 <= v <= 1, "must be a number from 0 to 1")
        check("repetition_penalty", lambda v: _is_number(v) and 0.01 <= v <= 100, "must be a number from 0.01 to 100")
        for name in ("presence_penalty", "frequency_penalty"):
            check(name, lambda v: _is_number(v) and -2 <= v <= 2, "must be a number from -2 to 2")
        for name in ("logprobs", "prompt_logprobs", "thinking_budget"):
            check(name, is_count(0), "must be an integer of at least 0")
        check("n", is_count(1), "must be an integer of at least 1")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        _require(all(isinstance(s, str) and s for s in stop), "stop", self.stop, "must be strings that are not empty")
        ids = tuple(self.stop_token_ids or ())
        _require(all(_is_number(i, int) and i >= 0 for i in ids), "stop_token_ids", ids, "must be token ids")
        bias = dict(self.logit_bias or {})
        ok = all(_is_number(i, int) and i >= 0 and _is_number(v) and abs(v) <= 100 for i, v in bias.items())
        _require(ok, "logit_bias", bias, "must map token ids to numbers from -100 to 100")
        for name, value in (("stop", stop), ("stop_token_ids", ids), ("logit_bias", bias)):
            object.__setattr__(self, name, value)
        for f in dataclasses.fields(self):
            if f.default is not dataclasses.MISSING and getattr(self, f.name) is None:
                object.__setattr__(self, f.name, f.default)

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def filled(self, defaults: SamplingParams) -> SamplingParams:
        """Itself with each None replaced by the default's value."""
        missing = {f.name: getattr(defaults, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) is None}
        return dataclasses.replace(self, **missing) if missing else self


GRAMMAR_KINDS = ("json", "regex", "choice", "tools")


@dataclass(frozen=True)
class Grammar:
    """What an answer must be, once its thinking has ended.

    kind "json": value is a JSON schema (True: any JSON object); "regex": a regular expression for the whole answer;
    "choice": a list of texts, one of which is the answer; "tools": a list of tools in OpenAI's shape, whose calls have
    arguments that are valid by their schemas. With `required` the answer is calls only (of one tool in the list, where
    it is given alone); without, text may come before them or instead. parallel: more than one call may be made.
    """

    kind: str
    value: Any
    required: bool = True
    parallel: bool = True

    def __post_init__(self) -> None:
        _require(self.kind in GRAMMAR_KINDS, "grammar.kind", self.kind, f"must be one of {', '.join(GRAMMAR_KINDS)}")
        if self.kind == "json":
            _require(self.value is True or isinstance(self.value, Mapping), "grammar.value", self.value,
                     "must be a JSON schema, an object")  # fmt: skip
        elif self.kind == "regex":
            _require(isinstance(self.value, str), "grammar.value", self.value, "must be a regular expression")
        else:
            ok = isinstance(self.value, Sequence) and not isinstance(self.value, str) and len(self.value) > 0
            _require(ok, "grammar.value", self.value, "must be a list that is not empty")
        if self.kind == "choice":
            _require(all(isinstance(c, str) and c for c in self.value), "grammar.value", self.value,
                     "must be texts that are not empty")  # fmt: skip


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's natural log-probability, and the likeliest tokens at its place, (id, log-probability) descending."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class MediaItem:
    """One picture or clip: pixels [R, 1176] float32, grid_thw [n, 3] int64, the embeddings (`tokens`) it gives, and
    the digest of its content. The runner drops the pixels when it has the embeddings."""

    pixels: Tensor | None
    grid_thw: Tensor
    tokens: int
    digest: str


@dataclass(frozen=True, eq=False)
class MediaPiece:
    """A picture, or one segment of a clip: it is encoded on its own. Its item, its place in that one's grid_thw, its
    pixels' rows in that one, and its rows in the embeddings of all items, one after the other."""

    item: int
    grid: int
    patches: slice
    rows: slice

    @property
    def cost(self) -> int:
        return self.patches.stop - self.patches.start


@dataclass(eq=False)
class Media:
    """A prompt's pictures and clips, and which placeholder token shows which of their embeddings.

    positions: the places of all placeholder tokens in the prompt, ascending; rows [M]: for each, its row in the
    embeddings of all items, one after the other. The runner fills `embeds` [rows of all items, H] piece by piece and
    says which are there in `encoded`.
    """

    items: list[MediaItem]
    positions: list[int]
    rows: list[int]
    embeds: Tensor | None = None
    encoded: set[MediaPiece] = field(default_factory=set)
    pieces: list[MediaPiece] = field(init=False)
    _ends: list[int] = field(init=False)  # where each item's rows end
    _piece_ends: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._ends = list(accumulate(item.tokens for item in self.items))
        self.pieces = [piece for i in range(len(self.items)) for piece in self._cut(i)]
        self._piece_ends = [piece.rows.stop for piece in self.pieces]

    def _cut(self, i: int) -> Iterator[MediaPiece]:
        item = self.items[i]
        ends = [0, *accumulate(item.grid_thw.prod(1).tolist())]
        patches_a_row, first = ends[-1] // item.tokens, self._ends[i] - item.tokens
        for grid, (a, b) in enumerate(pairwise(ends)):
            rows = slice(first + a // patches_a_row, first + b // patches_a_row)
            yield MediaPiece(i, grid, slice(a, b), rows)

    def content(self, start: int, end: int) -> bytes:
        """What the placeholders at [start, end) of the prompt show, as bytes."""
        parts = []
        for i in range(bisect_left(self.positions, start), bisect_left(self.positions, end)):
            item = bisect_right(self._ends, self.rows[i])
            parts += [self.items[item].digest.encode(), (self._ends[item] - self.rows[i]).to_bytes(8)]
        return b"".join(parts)

    def missing(self, start: int, end: int) -> dict[MediaPiece, int]:
        """The pieces that the placeholders at [start, end) show and that are not encoded, and where each is first."""
        found: dict[MediaPiece, int] = {}
        for i in range(bisect_left(self.positions, start), bisect_left(self.positions, end)):
            piece = self.pieces[bisect_right(self._piece_ends, self.rows[i])]
            if piece not in self.encoded:
                found.setdefault(piece, self.positions[i])
        return found


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One sequence on its way: prompt, parameters (all filled in), and what the engine has done about it so far.

    thinking: the mode that the prompt was made with, None for a prompt outside the chat format; it and `grammar` say
    what `guide` (openm3.engine.guide) is to enforce. priority: the larger goes first. deadline: the time.monotonic()
    at which the request ends, finished or not.
    """

    prompt_ids: list[int]
    params: SamplingParams
    max_tokens: int
    eos_ids: frozenset[int] = frozenset()
    seed: int = 0
    media: Media | None = None
    output: TextOutput | None = None
    grammar: Grammar | None = None
    thinking: str | None = None
    priority: int = 0
    deadline: float | None = None

    state: State = State.WAITING
    arrival: int = -1
    token_ids: list[int] = field(default_factory=list)  # the prompt and what was generated
    computed: int = 0  # the first tokens whose keys and values are in the pages
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of its first blocks (prefix.py)
    remembered: int = 0  # blocks whose pages the pool knows by their keys
    preemptions: int = 0
    cached: int = 0  # tokens of the prompt that an earlier request had computed
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one for each token of the answer, where wanted
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)  # None for the first token
    history: History | None = None  # the sampler's, for penalties
    guide: Guide | None = None  # what enforces the grammar and the thinking budget
    finish_reason: str | None = None  # "stop", "length", "cancelled", "deadline" or "error"
    error: Exception | None = None  # what went wrong, where finish_reason is "error"

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt_ids) :]

    @property
    def generated(self) -> int:
        return len(self.token_ids) - len(self.prompt_ids)
