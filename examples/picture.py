"""Talks with openm3-nano about a picture and a short clip, both shipped beside this file.

python examples/picture.py [MODEL]
"""

from __future__ import annotations

import sys
from pathlib import Path

from openm3 import LLM, SamplingParams

HERE = Path(__file__).parent
GREEDY = SamplingParams(temperature=0)


def ask(llm: LLM, messages: list[dict], question: str, **media: Path) -> None:
    """Adds a question (with `image=` or `video=`, a path) and its answer to the conversation, and prints both."""
    parts = [{"type": kind, kind: str(path)} for kind, path in media.items()]
    messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
    answer = llm.chat(messages, GREEDY)
    messages.append({"role": "assistant", "content": answer.content, "reasoning_content": answer.reasoning})
    thought = f"   (thought: {answer.reasoning})" if answer.reasoning else ""
    print(f"> {question}\n{answer.content}{thought}\n")


def main() -> None:
    llm = LLM(*sys.argv[1:2])
    about_picture: list[dict] = []
    ask(llm, about_picture, "What is at the top left?", image=HERE / "shapes.png")
    ask(llm, about_picture, "Where is the blue triangle?")
    ask(llm, about_picture, "How many objects are there?")
    about_clip: list[dict] = []
    ask(llm, about_clip, "What moves?", video=HERE / "star.mp4")
    ask(llm, about_clip, "In which direction does it move?")


if __name__ == "__main__":
    main()
