"""From tokens to text as it grows: decoding, stop strings, and the plain results that callers get.

Text that may yet become a stop string is held back, so that a reader never sees the beginning of one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openm3.engine.request import TokenLogprobs
    from openm3.processing import StreamDecoder, ToolCall


@dataclass(frozen=True)
class Completion:
    """An answer of `LLM.generate`. token_ids: all generated ones, those of eos and stop strings too.

    logprobs: for each of them, prompt_logprobs: for each token of the prompt (None for the first), where asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)


@dataclass(frozen=True)
class Finish:
    """The last event of a stream. finish_reason: "stop", "length" (cut off), "tool_calls" (a stop to call tools),
    or "deadline"."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class ChatResult:
    """An answer of `LLM.chat`; reasoning is None where the model did not think."""

    content: str
    reasoning: str | None
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0


class StopFinder:
    """Cuts a text at its first stop string, however the text is split; the first is the one that is complete first."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.held = ""  # a text that some stop string may begin with
        self.found: str | None = None  # the stop string that came

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is certainly no part of a stop string, whether one was found; the text ends before it)."""
        if not self.stops:
            return text, False
        text = self.held + text
        found = [(start + len(stop), start, stop) for stop in self.stops if (start := text.find(stop)) >= 0]
        if found:
            self.held = ""
            _, start, self.found = min(found)
            return text[:start], True
        longest = min(len(text), max(map(len, self.stops)) - 1)
        keep = next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self.stops)), 0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        text, self.held = self.held, ""
        return text


class TextOutput:
    """The text of one answer: `push` tokens in, `take` finished text out."""

    def __init__(self, decoder: StreamDecoder, stops: tuple[str, ...] = ()) -> None:
        self.decoder = decoder
        self.stops = StopFinder(stops)
        self.ready: list[str] = []

    def push(self, token: int) -> bool:
        """Takes one more token; True if its text completes a stop string."""
        return self._push_text(self.decoder.push(token))

    def finish(self) -> bool:
        """Lets go of what decoder and stop finder hold; True if that completes a stop string."""
        if self._push_text(self.decoder.flush()):
            return True
        self.ready.append(self.stops.flush())
        return False

    def take(self) -> str:
        text = "".join(self.ready)
        self.ready.clear()
        return text

    def _push_text(self, text: str) -> bool:
        text, stopped = self.stops.push(text)
        if text:
            self.ready.append(text)
        return stopped
