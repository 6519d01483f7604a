"""Plain text: documentation strings as documents, texts to go on with, and words to say again."""

from __future__ import annotations

import json
import random

from openm3.train.recipes.nano import corpus
from openm3.train.recipes.nano.case import Case, Talk, phrase
from openm3.train.recipes.nano.words import CITIES, COLOURS, NAMES, NOUNS, made_up


def document(rng: random.Random, split: str) -> Case:
    """One documentation string as it stands; every token of it is learned."""
    module, text = rng.choice(corpus.docstrings(split))
    return Case("document", [], (), "adaptive", facts={"module": module}, raw=text)


def go_on(rng: random.Random, split: str) -> Case:
    """The beginning of a text and how it goes on."""
    text = rng.choice(corpus.docstrings(split))[1]
    words = text.split(" ")
    cut = rng.randint(min(8, len(words) // 2), max(len(words) // 2, min(8, len(words) // 2)))
    start, rest = " ".join(words[:cut])[-600:].strip(), " ".join(words[cut : cut + 60]).strip()
    talk = Talk(rng, "continue")
    talk.ask(
        phrase(rng, ("Continue this text:", "Go on with this:", "Complete the text:", "How does this go on?"))
        + "\n"
        + start
    )
    return talk.answer(rest or "That is all.", thought="Go on with the text.").case()


def echo(rng: random.Random, split: str) -> Case:
    """Words, numbers, a sentence or a piece of JSON to be said again: copying, from which retrieval and tools grow."""
    talk = Talk(rng, "echo")
    for _ in range(rng.randint(1, 4)):
        roll = rng.random()
        if roll < 0.6:
            makers = (lambda: made_up(rng), lambda: str(rng.randrange(10 ** rng.randint(1, 5))),
                      lambda: rng.choice(NAMES + CITIES), lambda: rng.choice(NOUNS),
                      lambda: f"{made_up(rng)}_{made_up(rng)}")  # fmt: skip
            text = " ".join(rng.choice(makers)() for _ in range(rng.randint(1, 12)))
        elif roll < 0.8:
            words = rng.choice(corpus.docstrings(split))[1].split()
            at = rng.randrange(max(1, len(words) - 15))
            text = " ".join(words[at : at + rng.randint(3, 15)])
        else:
            text = json.dumps({made_up(rng): rng.choice((made_up(rng), rng.randrange(1000), rng.choice(COLOURS)))
                               for _ in range(rng.randint(1, 3))})  # fmt: skip
        lead = phrase(rng, ("Repeat:", "Say this again:", "Repeat after me:", "Copy this:", "Say:", "Write exactly:"))
        talk.ask(lead + rng.choice((" ", "\n")) + text).answer(text, thought="Say it again.")
    return talk.case()
