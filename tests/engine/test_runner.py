"""Scheduler, runner and sampler on a real (tiny) M3: an answer does not depend on how it was computed."""

import pytest
import torch
from engine_tiny import IMAGE, PAGE, VIDEO

from openm3.engine.core import Engine
from openm3.engine.output import TextOutput
from openm3.engine.request import Media, MediaItem, Request, SamplingParams, State
from openm3.engine.runner import MediaCache, Runner
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
    grids = torch.tensor([[1, 4, 6], [1, 4, 4], [2, 2, 4]])
    items = [item(torch.randn(int(grid.prod()), 1176, generator=generator), grid) for grid in grids]
    text = prompt(9)
    ids = [*text, *[IMAGE] * 6, *text[:3], *[VIDEO] * 2, 7, *[VIDEO] * 2, *text[3:5], *[IMAGE] * 4, *text]
    positions = [i for i, t in enumerate(ids) if t in (IMAGE, VIDEO)]
    rows = [*range(6), 10, 11, 12, 13, *range(6, 10)]
    return ids, Media(items, positions, rows)


def item(pixels: torch.Tensor, grid: torch.Tensor) -> MediaItem:
    return MediaItem(pixels, grid[None], len(pixels) // 4, str(hash(pixels.numpy().tobytes())))


def test_pictures_that_straddle_chunks_give_the_same_as_one_pass(model):
    ids, media = pictures()
    with torch.inference_mode():
        a, b, clip = media.items
        hidden = model(torch.tensor(ids), pixel_values=torch.cat([a.pixels, b.pixels]),
                       image_grid_thw=torch.cat([a.grid_thw, b.grid_thw]),
                       pixel_values_videos=clip.pixels, video_grid_thw=clip.grid_thw).hidden  # fmt: skip
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
    media.items[0] = item(-media.items[0].pixels, media.items[0].grid_thw[0])
    assert answers(model, [request(ids, media=media)])[0] != whole


def test_media_are_encoded_once_for_a_request_whatever_the_chunks(model, monkeypatch):
    calls = []
    original = type(model).encode_media
    monkeypatch.setattr(type(model), "encode_media", lambda self, *a: (calls.append(1), original(self, *a))[1])
    answers(model, [picture_request()], budget=3)
    assert len(calls) == 3  # two images and a clip, each once


def test_a_clip_is_encoded_segment_by_segment_as_the_chunks_reach_it(model):
    generator = torch.Generator().manual_seed(6)
    grids = torch.tensor([[2, 2, 4], [1, 2, 4]])
    ids = [5, *[VIDEO] * 6, 6, 7]

    def clip() -> Media:
        pixels = torch.randn(24, 1176, generator=generator.manual_seed(6))
        return Media([MediaItem(pixels, grids, 6, "clip")], [*range(1, 7)], [*range(6)])

    media = clip()
    running = engine(model, budget=3)
    running.add(request(ids, media=media))
    encoded = []
    while running.step():
        encoded.append(len(media.encoded))
    assert encoded[:3] == [1, 2, 2]
    assert media.items[0].pixels is None
    with torch.inference_mode():
        whole = model.encode_media(clip().items[0].pixels, grids)
    assert torch.allclose(media.embeds, whole, atol=1e-5)
    assert running.runner.media_cache.get("clip") is not None


def test_a_picture_seen_before_is_not_encoded_again(model, monkeypatch):
    calls = []
    original = type(model).encode_media
    monkeypatch.setattr(type(model), "encode_media", lambda self, *a: (calls.append(1), original(self, *a))[1])
    running = engine(model)
    first, again, other = picture_request(), picture_request(), picture_request()
    other.media.items[1] = item(other.media.items[1].pixels * 0.5, other.media.items[1].grid_thw[0])
    for r, encoded in ((first, 3), (again, 3), (other, 4)):
        running.add(r)
        while running.step():
            pass
        assert len(calls) == encoded
    assert again.output_ids == first.output_ids
    assert again.cached == 32
    assert other.cached == 24  # the whole blocks before the second picture
    assert other.output_ids == answers(model, [other_alone(other)])[0]


def other_alone(other: Request) -> Request:
    ids, media = pictures()
    media.items[1] = item(media.items[1].pixels * 0.5, media.items[1].grid_thw[0])
    return request(ids, media=media)


def test_the_cache_of_embeddings_keeps_to_its_bytes_and_the_last_used(model):
    cache = MediaCache(100)
    a, b, c = (torch.zeros(n, 1) for n in (10, 10, 8))
    cache.put("a", a)
    cache.put("b", b)
    assert cache.get("a") is a
    cache.put("c", c)
    assert (cache.get("b"), cache.bytes) == (None, 72)
    cache.put("huge", torch.zeros(26, 1))
    assert cache.get("huge") is None
    assert cache.get("a") is a


@pytest.mark.parametrize("budget", [7, 64])
def test_prompt_log_probabilities_are_those_of_the_plain_model(model, budget):
    scored = request(prompt(40), SamplingParams(0.0, 1.0, 0, prompt_logprobs=2, logprobs=1), n=3)
    running = engine(model, budget=budget)
    for r in (request(prompt(40)), scored):  # the first one's blocks are there to be reused
        running.add(r)
        while running.step():
            pass
    with torch.inference_mode():
        logits = model.logits(model(torch.tensor(scored.token_ids)).hidden)
        logits[:, [IMAGE, VIDEO]] = -torch.inf
    wanted = logits.double().log_softmax(-1)
    assert scored.prompt_logprobs[0] is None
    records = scored.prompt_logprobs[1:] + scored.logprobs
    assert [r.token for r in records] == scored.token_ids[1:]
    for i, record in enumerate(records):
        assert abs(record.logprob - wanted[i, record.token].item()) < 1e-4
        assert abs(record.top[0][1] - wanted[i].max().item()) < 1e-4
        assert len(record.top) == (2 if i < 39 else 1)


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
