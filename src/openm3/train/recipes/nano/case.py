"""A case is one conversation with its right answers: the same object trains the model and later examines it.

`Case.messages` is in the OpenAI shape and holds the assistant's turns as they should be. Training teaches all of them;
evaluation asks for the turns whose `expect` is set and compares. Nothing here draws or tokenizes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MODES = ("enabled", "adaptive", "disabled")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Expect:
    """What a right answer to one assistant turn is.

    `text`: the content, compared letter by letter (white space at the ends aside). `call`: the only tool call,
    (name, arguments). `digits`: as text, and scored digit by digit too.
    """

    kind: str
    value: Any

    def score(self, content: str | None, calls: Sequence[Any] = ()) -> bool:
        """Whether an answer is right; `calls` have `.name` and `.arguments` (a dict)."""
        if self.kind == "call":
            name, arguments = self.value
            return len(calls) == 1 and calls[0].name == name and same_json(calls[0].arguments, arguments)
        return not calls and (content or "").strip() == self.value

    def digit_scores(self, content: str | None) -> list[bool]:
        """Of a digits answer: for each true digit, whether the same place of the answer's number holds it."""
        read = re.sub(r"\D", "", content or "")
        truth = re.sub(r"\D", "", self.value)
        return [i < len(read) and read[i] == digit and len(read) == len(truth) for i, digit in enumerate(truth)]


def same_json(a: Any, b: Any) -> bool:
    """Equality of JSON values in which True is not 1 (Python's == says it is), while 2.0 is 2."""
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_json, a, b))
    return a == b


@dataclass(frozen=True)
class Case:
    """One conversation. `expects` has an entry for each assistant turn, None where a turn is given, not examined."""

    task: str
    messages: list[dict[str, Any]]
    expects: tuple[Expect | None, ...]
    thinking: str
    tools: list[dict[str, Any]] | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # what the case was built from
    raw: str | None = None  # a plain document instead of a conversation


class Talk:
    """Builds a Case turn by turn: `ask` for the user's turn (with media), `answer` for the assistant's."""

    def __init__(self, rng: random.Random, task: str, thinking: str | None = None, tools: list | None = None) -> None:
        self.rng, self.task, self.tools = rng, task, tools
        self.thinking = thinking or rng.choice(MODES)
        self.messages: list[dict[str, Any]] = developer(rng)
        self.expects: list[Expect | None] = []
        self.ahead = False  # whether the last question stands before its media

    def ask(self, text: str, *media: dict[str, Any], ahead: bool | None = None) -> Talk:
        """`ahead`: whether the text stands before its media; where not given, it does in one of five."""
        roll = self.rng.random() if media else 1.0
        self.ahead = ahead = bool(media) and (roll >= 0.8 if ahead is None else ahead)
        part = {"type": "text", "text": "\n" + text if roll < 0.2 and not ahead else text}
        parts = [part, *media] if ahead else [*media, part]
        self.messages.append({"role": "user", "content": parts if media else text})
        return self

    def answer(
        self, text: str, *, thought: str | None = None, hard: bool = False, expect: Expect | None = None, calls=None
    ) -> Talk:
        """`thought` is used when the mode is enabled, and when it is adaptive and the question is `hard`."""
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if thought and (self.thinking == "enabled" or (hard and self.thinking == "adaptive")):
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = calls
        self.messages.append(message)
        self.expects.append(expect or (None if calls else Expect("text", text)))
        return self

    def case(self, raw: str | None = None, **facts: Any) -> Case:
        return Case(self.task, self.messages, tuple(self.expects), self.thinking, self.tools, facts, raw)


DEVELOPERS = ("You are a helpful assistant.", "Be brief.", "Answer in one sentence.", "Be friendly.",
              "Answer the user.", "You help people.", "Be short and exact.", "Help with what you see.")  # fmt: skip


def developer(rng: random.Random) -> list[dict[str, Any]]:
    """Mostly nothing (the template's default), sometimes a system message as users write it."""
    return [{"role": "system", "content": rng.choice(DEVELOPERS)}] if rng.random() < 0.08 else []


def phrase(rng: random.Random, choices: Sequence[str], /, **slots: Any) -> str:
    """One of the phrasings, roughened as people write (case, end mark, a slip of the finger), then filled in."""
    text = rng.choice(choices)
    roll = rng.random()
    if roll < 0.45:
        return text.format(**slots)
    if roll < 0.60:
        text = text[:1].lower() + text[1:]
    elif roll < 0.70:
        text = text.rstrip("?.!")
    elif roll < 0.82:
        text = text[:1].lower() + text[1:].rstrip("?.!")
    elif roll < 0.90:
        text = (
            rng.choice(("Please: ", "Hey, ", "OK, ", "So, ", "Please tell me: ", "Hi! ")) + text[:1].lower() + text[1:]
        )
    elif roll < 0.96:
        text = slip(rng, text)
    else:
        text = text.rstrip("?.!") + rng.choice((", please", "??", " ?", "!", "..."))
    return text.format(**slots)


def slip(rng: random.Random, text: str) -> str:
    """Swaps or drops one letter inside a word of four letters or more; slots in braces stay whole."""
    words = text.split(" ")
    places = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    if places:
        i = rng.choice(places)
        word, at = words[i], rng.randrange(1, len(words[i]) - 2)
        words[i] = word[:at] + (word[at + 1] + word[at] + word[at + 2 :] if rng.random() < 0.6 else word[at + 1 :])
    return " ".join(words)
