"""Scheduler, runner and sampler on a real (tiny) M3: an answer does not depend on how it was computed."""

import pytest
import torch
from engine_tiny import IMAGE, PAGE, VIDEO

from openm3.engine.core import Engine
from openm3.engine.output import TextOutput
from openm3.engine.request import Media, Request, SamplingParams, State
from openm3.engine.runner import Runner
from openm3.engine.scheduler import Scheduler

LENGTHS = [3, 40, 17, 1, 64, 8]
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0)
WARM = SamplingParams(temperature=1.2, top_p=0.9, top_k=50)


class Numbers:
    def push(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""


def prompt(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 280, (n,), generator=torch.Generator().manual_seed(100 * seed + n)).tolist()


def request(ids: list[int], params=GREEDY, n=24, media=None, seed=0) -> Request:
    return Request(ids, params, max_tokens=n, media=media, seed=seed, output=TextOutput(Numbers()))


def engine(model, *, pages=64, budget=2048) -> Engine:
    return Engine(Runner(model, pages), num_pages=pages, page_size=PAGE, max_batch_tokens=budget)


def answers(model, requests: list[Request], **sizes) -> list[list[int]]:
    running = engine(model, **sizes)
    for r in requests:
        running.add(r)
    while running.step():
        pass
    assert running.scheduler.pool.free == running.scheduler.pool.num_pages
    assert all(r.state is State.FINISHED for r in requests)
    return [r.output_ids for r in requests]


@torch.inference_mode()
def plain_greedy(model, ids: list[int], n: int) -> list[int]:
    """Without cache, pages or chunks: the whole sequence again for every token."""
    tokens = list(ids)
    for _ in range(n):
        logits = model.logits(model(torch.tensor(tokens)).hidden[-1:])
        logits[:, [IMAGE, VIDEO]] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens[len(ids) :]


@pytest.fixture(scope="module")
def alone(model) -> list[list[int]]:
    return [answers(model, [request(prompt(n))])[0] for n in LENGTHS]


def test_one_request_alone_gives_what_the_plain_model_gives(model, alone):
    assert alone == [plain_greedy(model, prompt(n), 24) for n in LENGTHS]
    assert len({tuple(a) for a in alone}) == len(alone)  # the answers depend on the prompts


def test_a_batch_of_uneven_lengths_gives_what_each_alone_gives(model, alone):
    assert answers(model, [request(prompt(n)) for n in LENGTHS]) == alone


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 7, 8, 9, 13, 16, 50])
def test_prompts_in_chunks_of_any_size_give_the_same(model, alone, budget):
    assert answers(model, [request(prompt(n)) for n in LENGTHS], budget=budget) == alone


def test_preemption_changes_nothing(model, alone, monkeypatch):
    preempted = []
    preempt = Scheduler._preempt
    monkeypatch.setattr(Scheduler, "_preempt", lambda self, r: (preempted.append(r), preempt(self, r)))
    # 13 pages hold 104 tokens: the longest request (64 + 24) fits alone, all together (133 + 144) do not.
    assert answers(model, [request(prompt(n)) for n in LENGTHS], pages=13, budget=20) == alone
    assert preempted


def test_seeded_answers_are_the_same_alone_in_a_batch_chunked_and_preempted(model):
    def requests():
        return [request(prompt(n), WARM, seed=n) for n in LENGTHS]

    singles = [answers(model, [r])[0] for r in requests()]
    assert answers(model, requests()) == singles
    assert answers(model, requests(), budget=5) == singles
    assert answers(model, requests(), pages=13, budget=20) == singles
    assert answers(model, [request(prompt(n), WARM, seed=n + 1) for n in LENGTHS]) != singles


def picture_request() -> Request:
    ids, media = pictures()
    return request(ids, media=media)


def pictures() -> tuple[list[int], Media]:
    """A prompt with two images and a clip between, and their pixels: 6 + 4 image and 2 x 2 video tokens."""
    generator = torch.Generator().manual_seed(5)
    grids = torch.tensor([[1, 4, 6], [1, 4, 4]]), torch.tensor([[2, 2, 4]])
    images, videos = (torch.randn(int(g.prod(-1).sum()), 1176, generator=generator) for g in grids)
    text = prompt(9)
    ids = [*text, *[IMAGE] * 6, *text[:3], *[VIDEO] * 2, 7, *[VIDEO] * 2, *text[3:5], *[IMAGE] * 4, *text]
    positions = [i for i, t in enumerate(ids) if t in (IMAGE, VIDEO)]
    rows = [*range(6), 10, 11, 12, 13, *range(6, 10)]
    return ids, Media((images, grids[0]), (videos, grids[1]), positions, rows)


def test_pictures_that_straddle_chunks_give_the_same_as_one_pass(model):
    ids, media = pictures()
    with torch.inference_mode():
        (images, image_grid), (videos, video_grid) = media.images, media.videos
        hidden = model(torch.tensor(ids), pixel_values=images, image_grid_thw=image_grid,
                       pixel_values_videos=videos, video_grid_thw=video_grid).hidden  # fmt: skip
        first = int(model.logits(hidden[-1:])[:, :280].argmax())
    whole = answers(model, [picture_request()])[0]
    assert whole[0] == first
    for budget in (1, 2, 4, 7, 12, 31):
        assert answers(model, [picture_request()], budget=budget)[0] == whole
    mixed = [picture_request(), request(prompt(40)), picture_request()]
    assert answers(model, mixed, budget=9) == [whole, plain_greedy(model, prompt(40), 24), whole]


def test_other_pictures_give_another_answer(model):
    whole = answers(model, [picture_request()])[0]
    ids, media = pictures()
    media.images[0][:24] *= -1  # the first image
    assert answers(model, [request(ids, media=media)])[0] != whole


def test_media_are_encoded_once_for_a_request_whatever_the_chunks(model, monkeypatch):
    calls = []
    original = type(model).encode_media
    monkeypatch.setattr(type(model), "encode_media", lambda self, *a: (calls.append(1), original(self, *a))[1])
    answers(model, [picture_request()], budget=3)
    assert len(calls) == 2  # the images together, the videos together


def test_placeholders_are_never_written(model):
    with torch.no_grad():
        row = model.lm_head.weight[[IMAGE, VIDEO]].clone()
        model.lm_head.weight[[IMAGE, VIDEO]] = 1e3 * model.lm_head.weight[[1, 2]]
    try:
        flat = SamplingParams(temperature=5.0, top_p=1.0, top_k=0)
        tokens = answers(model, [request(prompt(5), flat, n=100)])[0]
    finally:
        with torch.no_grad():
            model.lm_head.weight[[IMAGE, VIDEO]] = row
    assert not {IMAGE, VIDEO} & set(tokens)


def test_cancelling_at_any_step_leaves_the_others_as_they_were(model, alone):
    for step in (0, 1, 4, 9):
        running = engine(model, budget=20)
        requests = [request(prompt(n)) for n in LENGTHS]
        for r in requests:
            running.add(r)
        for _ in range(step):
            running.step()
        for r in requests[::2]:
            running.cancel(r)
        while running.step():
            pass
        assert [r.output_ids for r in requests[1::2]] == alone[1::2]
        assert all(r.finish_reason == "cancelled" for r in requests[::2])
        assert running.scheduler.pool.free == 64
