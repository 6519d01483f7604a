"""The vocabulary of openm3-nano: 3,072 ids, byte-level BPE, made for copying.

A small model copies a made-up word far better when its pieces are the same wherever it stands: after a space, a quote,
a `<`. So the merges are learned on words without their leading space, and last come merges of the space with the most
frequent first pieces: " bramel" is then the pieces of "bramel", the first one perhaps with its space. Every digit is a
token of its own. M3's special tokens are the last 14 ids.

    python -m openm3.train.recipes.nano.tokenizer      writes tokenizer.json again

Byte for byte under Python 3.11, whose documentation strings it reads.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections import Counter
from pathlib import Path

from openm3.config import SPECIAL_TOKENS

SIZE = 3072
SPACED = 900  # merges of a space with a first piece
PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"  # the final split
BARE = r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|[\r\n]+|[^\S\r\n]+"  # the split on which merges are learned
FILE = Path(__file__).resolve().parents[3] / "weights" / "openm3-nano" / "tokenizer.json"


@functools.cache
def load():
    """The committed tokenizer (tokenizers.Tokenizer)."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(FILE))


def texts(seed: int = 0) -> list[str]:
    """What the vocabulary is learned from: the real text once, and some of every kind of conversation."""
    from openm3.train.recipes.nano import (
        arithmetic,
        clips,
        corpus,
        dialogue,
        digits,
        pictures,
        prose,
        retrieval,
        toolcalls,
    )
    from openm3.train.recipes.nano.render import render

    rng = random.Random(seed)
    out = [text for _, text in corpus.docstrings("train")]
    tasks = {pictures.sample: 500, clips.sample: 300, digits.sample: 50, arithmetic.sample: 100, toolcalls.sample: 700,
             dialogue.sample: 200, dialogue.chat: 400, prose.echo: 200}  # fmt: skip
    for sample, n in tasks.items():
        for _ in range(n):
            case = sample(rng, "train")
            out.append(render(case.messages, case.tools, case.thinking))
    for _ in range(2000):
        known = retrieval.facts(rng, 8)
        out.append(" ".join(retrieval.state(fact) for fact in known))
    special = "|".join(map(re.escape, SPECIAL_TOKENS))
    return [piece for text in out for piece in re.split(special, text) if piece]


def train() -> str:
    """tokenizer.json, learned anew."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    def split(pattern: str):
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])  # fmt: skip

    corpus = texts()
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = split(BARE)
    size = SIZE - len(SPECIAL_TOKENS) - SPACED
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  show_progress=False, special_tokens=[])  # fmt: skip
    bare.train_from_iterator(corpus, trainer)
    model = json.loads(bare.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    for piece in first_pieces(corpus, bare)[:SPACED]:
        vocab["Ġ" + piece] = len(vocab)
        merges.append(("Ġ", piece))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = split(PATTERN)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer.to_str(pretty=False) + "\n"


def first_pieces(corpus: list[str], bare) -> list[str]:
    """The first pieces of words that follow a space, most frequent first. Digits stay without it."""
    counts: Counter[str] = Counter()
    words = Counter(word for text in corpus for word in re.findall(r"(?<= )[^\W\d_]+|(?<= )[^\w\s]+", text))
    for word, n in words.items():
        counts[bare.encode(word).tokens[0]] += n
    return [piece for piece, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


if __name__ == "__main__":
    FILE.write_text(train())
