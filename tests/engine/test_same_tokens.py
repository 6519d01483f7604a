"""The same seed and prompt give the same float32 tokens, however they are computed: alone, in a busy batch, in chunks,
preempted and resumed, from reused pages.

Sums of another order round differently, which can tip a choice between experts, blocks or tokens that are all but
equal. Where two answers differ, the step is printed, and how close the first choice was that the two computations made
differently: the gap between two experts' or two blocks' scores, or the difference of the logits where every choice
before was the same. Only gaps under LEAST are accepted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import pytest
import torch

import openm3.msa
from openm3.checkpoint import load_model, resolve
from openm3.engine.core import Engine
from openm3.engine.output import TextOutput
from openm3.engine.request import Request, SamplingParams
from openm3.engine.runner import Runner
from openm3.model.moe import Router
from openm3.processing import Tokenizer

LEAST = 1e-4
PAGE = 32
WARM = SamplingParams(temperature=1.0, top_p=0.95, top_k=40)
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0)


@dataclass
class Trace:
    """What a model chose for each token, by the tokens up to it: of each layer in turn, (chosen, their scores)."""

    choices: dict[int, list[list[dict[int, float]]]] = field(default_factory=dict)
    logits: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    _now: list[int] = field(default_factory=list)

    def begin(self, prefixes: list[int]) -> None:
        self._now = prefixes
        self.choices.update({prefix: [] for prefix in prefixes})

    def add(self, chosen: torch.Tensor, scores: torch.Tensor) -> None:
        """chosen, scores [groups, T, k] of one layer; chosen below 0 is none."""
        for prefix, ids, values in zip(self._now, chosen.transpose(0, 1).tolist(), scores.transpose(0, 1).tolist()):
            self.choices[prefix].append([dict(zip(i, v)) for i, v in zip(ids, values)])


def first_gap(a: Trace, b: Trace, prefixes: list[int]) -> float | None:
    """How close the first choice was that the two made differently for these tokens; None: they made all alike."""
    for prefix in prefixes:
        for one_layer, other_layer in zip(a.choices[prefix], b.choices[prefix], strict=True):
            for one, other in zip(one_layer, other_layer, strict=True):
                if one.keys() != other.keys():
                    lost = max(one[i] for i in one.keys() - other.keys())
                    return abs(lost - max(other[i] for i in other.keys() - one.keys()))
    return None


def prefixes_of(tokens: list[int], start: int, end: int) -> list[int]:
    return [hash(tuple(tokens[: i + 1])) for i in range(start, end)]


class Watched(Runner):
    """Writes down what the model chooses, and the logits of every token drawn, by request and place."""

    def __init__(self, model, num_pages: int, trace: Trace) -> None:
        super().__init__(model, num_pages)
        self.trace = trace

    def run(self, batch, tokens=None):
        places = [prefixes_of(c.request.token_ids, c.start, c.end) for c in batch.chunks]
        self.trace.begin([place for chunk in places for place in chunk])
        logits = super().run(batch, tokens)
        for row, request in zip(logits, batch.sampling, strict=True):
            self.trace.logits[request.seed, request.generated] = row.clone()
        return logits


@pytest.fixture
def watch(nano, monkeypatch):
    """`watch(trace)`: from now on the model's choices are written to that trace."""
    current: list[Trace] = []

    def routed(router, _, out):
        chosen, _, scores = out
        current[-1].add(chosen[None], (scores + router.bias).gather(1, chosen)[None])

    def select(index_q, index_k, plan, **more):
        blocks, scores = original(index_q, index_k, plan, return_scores=True, **more)
        current[-1].add(blocks, scores)
        return blocks

    original = openm3.msa.select_blocks
    monkeypatch.setattr(openm3.msa, "select_blocks", select)
    hooks = [m.register_forward_hook(routed) for m in nano[0].modules() if isinstance(m, Router)]
    yield current.append
    for hook in hooks:
        hook.remove()


@pytest.fixture(scope="module")
def nano():
    directory = resolve("openm3-nano")
    return load_model(directory, device="cpu", dtype=torch.float32), Tokenizer.from_file(directory / "tokenizer.json")


def requests(tokenizer: Tokenizer, lengths: list[int], n: int) -> list[Request]:
    """Prompts of words, each with its own seed; every third is greedy, the second half shares a beginning."""
    ids = tokenizer.encode(" ".join(f"{word} {i}" for i in range(400) for word in ("river", "seven", "clock", "paper")))
    made = []
    for i, length in enumerate(lengths):
        start = 0 if i >= len(lengths) // 2 else 31 * (i + 1)
        prompt = ids[start : start + length] + tokenizer.encode(f" and then {i}:")
        output = TextOutput(tokenizer.stream())
        made.append(Request(prompt, WARM if i % 3 else GREEDY, n, seed=i, output=output))
    return made


def compute(runner: Watched, todo: list[Request], *, pages: int, budget=2048, between: int | None = 0) -> Engine:
    """Runs requests to their end; between: the steps before the next one comes, None: as many as there are."""
    engine = Engine(runner, num_pages=pages, page_size=PAGE, max_batch_tokens=budget)
    for request in todo:
        engine.add(request)
        steps = count() if between is None else range(between)
        for _ in steps:
            if not engine.step():
                break
    while engine.step():
        pass
    assert all(request.finish_reason == "length" for request in todo)
    assert engine.scheduler.pool.free == pages
    return engine


def differences(how: str, alone: list[Request], reference: Trace, todo: list[Request], trace: Trace) -> list[float]:
    """The gaps behind the answers that differ."""
    found = []
    for one, other in zip(alone, todo, strict=True):
        if one.output_ids == other.output_ids:
            continue
        place = next(i for i, (a, b) in enumerate(zip(one.output_ids, other.output_ids, strict=True)) if a != b)
        gap = first_gap(reference, trace, prefixes_of(one.token_ids, 0, len(one.prompt_ids) + place))
        if gap is None:
            a, b = reference.logits[one.seed, place], trace.logits[one.seed, place]
            gap = float((a - b)[torch.isfinite(a)].abs().max())
        print(
            f"{how}: request {one.seed}, step {place}: {one.output_ids[place]} or {other.output_ids[place]}, {gap:.2e}"
        )
        found.append(gap)
    return found


def check(nano, watch, lengths: list[int], n: int) -> None:
    model, tokenizer = nano
    alone, reference = requests(tokenizer, lengths, n), Trace()
    watch(reference)
    for request in alone:
        compute(Watched(model, 128, reference), [request], pages=128)
    needs = [(len(r.prompt_ids) + n) // PAGE + 1 for r in alone]
    cases = {
        "busy batch": dict(),
        "chunked": dict(budget=61),
        "preempted": dict(pages=max(needs) + 1, between=3),  # the later ones come first, and take the others' pages
        "prefix reused": dict(between=None),
    }
    found = {}
    for how, sizes in cases.items():
        sizes = {"pages": 512, **sizes}
        todo, trace = requests(tokenizer, lengths, n), Trace()
        watch(trace)
        for request in todo:
            request.priority = request.seed if how == "preempted" else 0
        engine = compute(Watched(model, sizes["pages"], trace), todo, **sizes)
        if how == "preempted":
            assert engine.scheduler.preemptions > 0
        if how == "prefix reused":
            assert sum(r.cached for r in todo) >= PAGE
        found[how] = differences(how, alone, reference, todo, trace)
    print({how: len(gaps) for how, gaps in found.items()}, f"differ of {len(lengths)} answers of {n} tokens each")
    assert max((gap for gaps in found.values() for gap in gaps), default=0.0) < LEAST
    assert len({tuple(r.output_ids) for r in alone}) == len(alone)


def test_answers_do_not_depend_on_how_they_are_computed(nano, watch):
    check(nano, watch, lengths=[5, 90, 560, 40, 540, 130], n=16)


@pytest.mark.soak
def test_long_answers_do_not_depend_on_how_they_are_computed(nano, watch):
    check(nano, watch, lengths=[3, 700, 1500, 90, 1500, 2300], n=100)


def test_the_first_different_choice_is_found_with_its_gap():
    a, b = Trace(), Trace()
    for trace, scores in ((a, [0.5, 0.4, 0.3]), (b, [0.5, 0.4, 0.4001])):
        trace.begin([1, 2])
        for values in ([0.9, 0.8, 0.7], scores):
            row = torch.tensor(values, dtype=torch.float64)
            top = row.topk(2)
            trace.add(top.indices.expand(1, 2, 2), top.values.expand(1, 2, 2))
    assert first_gap(a, b, [1, 2]) == pytest.approx(1e-4)
    assert first_gap(a, a, [1, 2]) is None
