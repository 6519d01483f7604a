"""Decode over buffers that stay: the same logits and answers as steps that are laid out anew."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from engine_tiny import PAGE, VOCAB
from test_runner import LENGTHS, WARM, prompt, request

from openm3.engine.core import Engine
from openm3.engine.request import Request, State
from openm3.engine.runner import Runner
from openm3.engine.scheduler import Chunk, ScheduledBatch

PAGES = 64


def twins(model) -> list[Runner]:
    """A plain runner and one with graphs, whose caches hold the same."""
    runners = [Runner(model, PAGES, decode_graphs=False), Runner(model, PAGES, decode_graphs=True)]
    generator = torch.Generator().manual_seed(3)
    for mine, other in zip(runners[0].cache.layers, runners[1].cache.layers):
        for a, b in ((mine.k, other.k), (mine.v, other.v), (mine.index_k, other.index_k)):
            if a is not None:
                a.copy_(torch.randn(a.shape, generator=generator))
                b[:PAGES] = a
    return runners


def decoding(rng: random.Random, n: int, among: range = range(PAGES)) -> ScheduledBatch:
    """The newest token of n answers, of any lengths, in pages anywhere among those."""
    lens = [rng.randint(2, 7 * PAGE) for _ in range(n)]
    pages, chunks = rng.sample(among, len(among)), []
    for length in lens:
        made = Request(prompt(1), WARM, max_tokens=99)
        made.token_ids += [rng.randrange(5, VOCAB - 20) for _ in range(length - 1)]
        made.pages = [pages.pop() for _ in range(-(-length // PAGE))]
        chunks.append(Chunk(made, length - 1, length, samples=True))
    return ScheduledBatch(chunks)


def check(model, seed: int, tolerance: float, share: float = 1.0) -> Runner:
    """share: of the rows that must be so close; in half precision one may take another expert or block near a tie."""
    rng, (plain, graphs), gap = random.Random(seed), twins(model), []
    for n in (1, 3, 8, 5, 2, 7, 8):
        batch = decoding(rng, n)
        wanted, found = plain.run(batch), graphs.run(batch)
        assert found.shape == wanted.shape
        assert torch.equal(found.isfinite(), wanted.isfinite())
        gaps = (found - wanted).nan_to_num(0.0).abs().amax(1)  # -inf less -inf, for tokens that are never written
        gap.append(gaps / wanted.masked_fill(wanted.isinf(), 0.0).abs().max())
    assert (torch.cat(gap) <= tolerance).float().mean() >= share
    return graphs


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_any_batch_of_answers_gets_the_logits_of_the_plain_runner(model, seed):
    graphs = check(model, seed, 1e-5)
    batches, widths = zip(*graphs.graphs.steps)
    assert set(batches) <= {1, 2, 4, 8}
    assert set(widths) <= {1, 2, 4, 8}


def test_an_answer_at_the_end_of_the_context_has_no_more_pages_than_that(model):
    context = 200  # 13 pages: rounded up they would be 16
    short = copy.copy(model)
    short.config = replace(model.config, text=replace(model.config.text, max_position_embeddings=context))
    made = Request(prompt(1), WARM, max_tokens=context)
    made.token_ids += [5] * (context - 1)
    made.pages = list(range(-(-context // PAGE)))
    batch = ScheduledBatch([Chunk(made, context - 1, context, samples=True)])
    runners = [Runner(short, len(made.pages), decode_graphs=graphs) for graphs in (False, True)]
    for runner in runners:
        for layer in runner.cache.layers:
            for x in (layer.k, layer.v, layer.index_k):
                if x is not None:
                    x.zero_()
    plain, graphs = (runner.run(batch) for runner in runners)
    assert (graphs - plain).nan_to_num(0.0).abs().max() <= 1e-5
    assert list(runners[1].graphs.steps) == [(1, len(made.pages))]


def test_idle_rows_write_nobodys_page(model):
    _, graphs = twins(model)
    before = [(layer.k[:PAGES].clone(), layer.v[:PAGES].clone()) for layer in graphs.cache.layers]
    batch = decoding(random.Random(4), 3)
    graphs.run(batch)
    written = {c.request.pages[c.start // PAGE] for c in batch.chunks}
    for layer, (k, v) in zip(graphs.cache.layers, before):
        changed = (layer.k[:PAGES] != k).flatten(1).any(1) | (layer.v[:PAGES] != v).flatten(1).any(1)
        assert set(changed.nonzero().flatten().tolist()) == written


ASKED = [WARM, replace(WARM, logprobs=3), replace(WARM, repetition_penalty=1.3), replace(WARM, temperature=0.0)]


def answered(model, requests: list[Request], graphs: bool, ahead: bool) -> tuple[list, Engine]:
    engine = Engine(Runner(model, PAGES, decode_graphs=graphs), num_pages=PAGES, page_size=PAGE, max_batch_tokens=20,
                    ahead=ahead)  # fmt: skip
    for r in requests:
        engine.add(r)
    while engine.step():
        pass
    assert all(r.state is State.FINISHED for r in requests)
    assert engine.scheduler.pool.free == PAGES
    return [(r.output_ids, [x.token for x in r.logprobs]) for r in requests], engine


@pytest.mark.parametrize("ahead", [False, True], ids=["a step at a time", "a step ahead"])
def test_answers_are_the_same_with_prompts_that_come_in_between(model, ahead):
    answers = []
    for graphs in (False, True):
        requests = [request(prompt(n), ASKED[n % 4], seed=n) for n in LENGTHS]
        found, engine = answered(model, requests, graphs, ahead and graphs)
        answers.append(found)
    assert answers[0] == answers[1]
    assert engine.runner.graphs.steps


@pytest.mark.gpu
def test_a_step_ahead_of_captured_graphs_gives_the_same_answers(model):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = copy.deepcopy(model).to("cuda", torch.bfloat16)
    answers = []
    for ahead in (False, True):
        requests = [request(prompt(9), ASKED[n % 4], n=40, seed=n) for n in range(8)]
        answers.append(answered(model, requests, True, ahead)[0])
    assert answers[0] == answers[1]
    assert all(len(tokens) == 40 for tokens, _ in answers[0])


@pytest.mark.gpu
def test_captured_steps_follow_lengths_and_pages_that_change(model):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    graphs = check(copy.deepcopy(model).to("cuda", torch.bfloat16), 0, 3e-2, share=0.9)
    mine, others = decoding(random.Random(9), 4, range(32)), decoding(random.Random(10), 4, range(32, PAGES))
    first = graphs.run(mine).clone()
    graphs.run(others)
    assert torch.equal(graphs.run(mine), first)
