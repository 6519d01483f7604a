"""`openm3 chat` with a stand-in for the model: its answers say what it was asked, and it needs no weights.

It waits for the file named as the first argument before it is "loaded", if there is one.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace as Namespace

from openm3.engine import Finish
from openm3.processing import ContentDelta, ThinkingDelta
from openm3.terminal.chat import Chat

LONG = "".join(f"- line {i} of the **answer**\n" for i in range(120))


class StandIn:
    def __init__(self) -> None:
        self.config = Namespace(text=Namespace(max_position_embeddings=1000))
        self.processor = Namespace(tokenizer=Namespace(encode=str.split))
        self.model = Namespace(embed=Namespace(weight=Namespace(device="cpu")))
        self.closed = 0

    def chat(self, messages, params=None, *, thinking, stream):
        content = messages[-1]["content"]
        parts = [] if isinstance(content, str) else [part["type"] for part in content[:-1]]
        text = content if isinstance(content, str) else content[-1]["text"]
        if text == "too long":
            raise ValueError("the prompt has 1,200 tokens; the model's context is 1000 tokens")
        return self.answer(messages, text, parts, thinking)

    def answer(self, messages, text, parts, thinking):
        try:
            if thinking != "disabled":
                for word in ("I ", "think ", "of ", text):
                    yield ThinkingDelta(word)
            if text == "for ever":
                yield ContentDelta("It goes on")
                while True:
                    time.sleep(0.01)
                    yield ContentDelta(" and on")
            answer = LONG if text == "long" else f"**{len(messages)}** {text!r} {parts} {thinking}"
            for i in range(0, len(answer), 7):
                yield ContentDelta(answer[i : i + 7])
            yield ContentDelta(f"\n\nclosed: {self.closed}")
            yield Finish("length" if text == "fill" else "stop", 10, 990 if text == "fill" else 20)
        finally:
            self.closed += 1


def load() -> StandIn:
    if len(sys.argv) > 1:
        while not Path(sys.argv[1]).exists():
            time.sleep(0.02)
        if Path(sys.argv[1]).read_text() == "broken":
            raise ValueError("the model is broken")
    return StandIn()


if __name__ == "__main__":
    chat = Chat("stand-in", "1 parameter", load)
    try:
        chat.run()
    except ValueError as error:
        print(error)
        sys.exit(2)
    chat.close()
