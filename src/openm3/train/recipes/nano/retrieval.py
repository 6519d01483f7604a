"""One fact among many of its kind, in a long document of real text; asked for by name after the document.

A document is a run of documentation strings with sentences such as "The code of the blue lantern is 7341." between the
paragraphs. The other facts are of the same kind and often share the adjective or the noun, so both must be read.
The answer says the fact again. In training one document carries several questions.
"""

from __future__ import annotations

import functools
import random
import re

from openm3.train.recipes.nano import corpus
from openm3.train.recipes.nano.case import Case, Talk, phrase
from openm3.train.recipes.nano.tokenizer import load
from openm3.train.recipes.nano.words import ADJECTIVES, CITIES, NAMES, NOUNS, made_up

SIZES = {"1K": 1024, "4K": 4096, "8K": 8192}
LONGEST = 8600  # tokens of the longest document in training
VALUES = {
    "code": lambda rng: f"{rng.randrange(10_000):04d}",
    "number": lambda rng: str(rng.randint(10, 999)),
    "owner": lambda rng: rng.choice(NAMES),
    "home": lambda rng: rng.choice(CITIES),
    "password": made_up,
}
ASKS = ("What is the {k} of the {e}?", "Which {k} does the {e} have?", "Tell me the {k} of the {e}.",
        "The {k} of the {e}?", "Find the {k} of the {e}.", "I need the {k} of the {e}.",
        "According to the text, what is the {k} of the {e}?")  # fmt: skip
LEADS = ("Read this text.", "Here is a document.", "Text:", "Read the document and answer.", "Look at this:", "")


@functools.cache
def paragraphs(split: str) -> tuple[tuple[tuple[str, int], ...], ...]:
    """The real text, docstring by docstring: its paragraphs, each with its number of tokens."""
    docs = [[p for p in re.split(r"\n\s*\n", doc) if len(p) <= 900] for _, doc in corpus.docstrings(split)]
    flat = [p for doc in docs for p in doc]
    sizes = iter([len(e.ids) for e in load().encode_batch([p + "\n" for p in flat])])
    return tuple(tuple((p, next(sizes)) for p in doc) for doc in docs if doc)


def facts(rng: random.Random, n: int) -> list[tuple[str, str, str]]:
    """n facts (kind, entity, value), no two of a kind and entity; values may repeat."""
    adjectives, nouns = rng.sample(ADJECTIVES, min(len(ADJECTIVES), n)), rng.sample(NOUNS, min(len(NOUNS), n))
    main = rng.choice(list(VALUES))
    out: dict[tuple[str, str], str] = {}
    while len(out) < n:
        kind = main if rng.random() < 0.8 else rng.choice(list(VALUES))
        shared = out and rng.random() < 0.5
        adjective, noun = rng.choice(adjectives), rng.choice(nouns)
        if shared:  # a neighbour of a fact that is there
            _, entity = rng.choice(list(out))
            words = entity.split()
            adjective, noun = rng.choice(((words[0], noun), (adjective, words[1]), tuple(words)))
        out.setdefault((kind, f"{adjective} {noun}"), VALUES[kind](rng))
    return [(kind, entity, value) for (kind, entity), value in out.items()]


def state(fact: tuple[str, str, str]) -> str:
    kind, entity, value = fact
    return f"The {kind} of the {entity} is {value}."


def document(rng: random.Random, split: str, tokens: int, sentences: list[str]) -> str:
    """Real text of about `tokens` tokens in all, with the sentences at random places between its paragraphs."""
    pool = paragraphs(split)
    left = tokens - len(load().encode("\n".join(sentences)).ids)
    pieces: list[str] = []
    while left > 20:
        doc = rng.choice(pool)
        for text, size in doc[rng.randrange(len(doc)) :]:
            if size > left + 10:
                continue
            pieces.append(text)
            left -= size
            if left <= 20:
                break
    for sentence in sentences:
        pieces.insert(rng.randint(0, len(pieces)), sentence)
    return "\n".join(pieces)


def length(rng: random.Random, longest: int) -> int:
    """Tokens of a training document: mostly short, with a tail up to `longest`."""
    low, high = rng.choices(((60, 300), (300, 1000), (1000, 2200), (2200, 4600), (4600, LONGEST)), (50, 26, 12, 7, 5))[
        0
    ]
    return min(rng.randint(low, high), longest)


def sample(
    rng: random.Random, split: str, kind: str | None = None, longest: int = LONGEST, thinking: str | None = None
) -> Case:
    """`kind` one of SIZES (one question), or None: any length up to `longest`, several questions."""
    tokens = SIZES[kind] if kind else length(rng, longest)
    n = min(32, max(2, round(tokens / rng.randint(40, 250))))
    known = facts(rng, n)
    text = document(rng, split, tokens, [state(fact) for fact in known])
    talk = Talk(rng, f"retrieval {kind}" if kind else "retrieval", thinking)
    turns = 1 if kind else min(n, rng.randint(2, 4) + tokens // 700)
    for turn, fact in enumerate(rng.sample(known, turns)):
        question = phrase(rng, ASKS, k=fact[0], e=fact[1])
        if turn == 0:
            lead = rng.choice(LEADS)
            question = f"{lead}\n{text}\n\n{question}".lstrip()
        talk.ask(question).answer(state(fact), thought=f"{fact[1]}: {fact[2]}")
    return talk.case(facts=known, tokens=tokens, document=text)
