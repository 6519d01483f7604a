"""The scheduler as a pure state machine, over pages that store their tokens so that every read is checked."""

from collections import Counter

import pytest
import torch
from engine_tiny import continued, next_token
from hypothesis import given, settings
from hypothesis import strategies as st

from openm3.engine.pages import PagePool
from openm3.engine.request import Media, MediaItem, Request, RequestError, SamplingParams, State
from openm3.engine.scheduler import ScheduledBatch, Scheduler


def make_request(prompt: list[int], max_tokens: int, grids: tuple[tuple[int, int, int], ...] = ()) -> Request:
    """grids: of pictures, shown by the prompt's tokens from the second on, four patches each."""
    items = [MediaItem(None, torch.tensor([grid]), grid[0] * grid[1] * grid[2] // 4, str(grid)) for grid in grids]
    shown = sum(item.tokens for item in items)
    media = Media(items, [*range(1, 1 + shown)], [*range(shown)]) if items else None
    return Request(prompt, SamplingParams(), max_tokens=max_tokens, media=media)


class Machine:
    """Steps a scheduler; pages hold tokens, and a token is only ever computed from what the pages hold."""

    def __init__(
        self, pages: int, page_size: int, budget: int, max_running: int = 256, patches: int | None = None
    ) -> None:
        self.patches = patches
        self.scheduler = Scheduler(PagePool(pages), page_size, max_batch_tokens=budget, max_running=max_running)
        self.slots: dict[tuple[int, int], int] = {}

    def step(self) -> bool:
        batch = self.scheduler.schedule(patches=self.patches)
        self.check_pages()
        if batch is None:
            return False
        size = self.scheduler.page_size
        assert sum(c.end - c.start for c in batch.chunks) <= self.scheduler.max_batch_tokens
        assert len({id(c.request) for c in batch.chunks}) == len(batch.chunks)
        tokens = []
        self.encode(batch)
        for chunk in batch.chunks:
            request = chunk.request
            for i in range(chunk.start, chunk.end):
                self.slots[request.pages[i // size], i % size] = request.token_ids[i]
            stored = [self.slots[request.pages[i // size], i % size] for i in range(chunk.end)]
            assert stored == request.token_ids[: chunk.end]
            if chunk.samples:
                tokens.append(next_token(stored))
        answered = batch.sampling
        self.scheduler.advance(batch, tokens)
        for request in answered:
            if request.generated == request.max_tokens:
                self.scheduler.finish(request, "length")
        return True

    def encode(self, batch: ScheduledBatch) -> None:
        """What the runner does with media: all that a chunk shows is there after the step, and the count is right."""
        pieces = {}
        for chunk in batch.chunks:
            if chunk.request.media:
                pieces |= dict.fromkeys(chunk.request.media.missing(chunk.start, chunk.end), chunk.request.media)
        for piece, media in pieces.items():
            media.encoded.add(piece)
        assert sum(piece.cost for piece in pieces) == batch.patches
        if self.patches is not None and any(chunk.request.generated for chunk in batch.chunks):
            assert batch.patches <= self.patches or len(pieces) == 1

    def check_pages(self) -> None:
        pool = self.scheduler.pool
        held = Counter(page for request in self.scheduler.running for page in request.pages)
        assert [pool.holders(page) for page in range(pool.num_pages)] == [held[p] for p in range(pool.num_pages)]
        assert len(held) + pool.free == pool.num_pages
        assert all(not request.pages for request in self.scheduler.waiting)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_everyone_finishes_once_with_the_right_answer_and_every_page_comes_back(data):
    page_size = data.draw(st.integers(1, 4), "page_size")
    pages = data.draw(st.integers(2, 12), "pages")
    patches = data.draw(st.none() | st.integers(1, 24), "patches")
    machine = Machine(pages, page_size, data.draw(st.integers(1, 20), "budget"), data.draw(st.integers(1, 8)), patches)
    capacity = pages * page_size
    requests, cancelled = [], set()
    for number in range(data.draw(st.integers(1, 8), "requests")):
        n = data.draw(st.integers(1, capacity - 1))
        grids = tuple((1, 2, 2 * side) for side in data.draw(st.lists(st.integers(1, 4), max_size=3)))
        grids = grids if sum(w // 2 for _, _, w in grids) < n else ()
        prompt = [number * 100 + i for i in range(n)]
        requests.append(make_request(prompt, data.draw(st.integers(1, capacity - n)), grids))
    unborn = list(requests)
    for steps in range(20_000):
        action = data.draw(st.sampled_from("aacsss")) if steps < 60 else "a" if unborn else "s"
        if action == "a" and unborn:
            machine.scheduler.add(unborn.pop(0))
        elif action == "c":
            request = data.draw(st.sampled_from(requests))
            if request not in unborn and request.state is not State.FINISHED:
                machine.scheduler.finish(request, "cancelled")
                cancelled.add(id(request))
        elif not machine.step() and not unborn:
            break
    machine.check_pages()
    assert machine.scheduler.pool.free == pages
    assert not machine.scheduler.running
    assert not machine.scheduler.waiting
    for request in requests:
        assert request.state is State.FINISHED
        if id(request) in cancelled:
            assert request.finish_reason == "cancelled"
        else:
            assert request.finish_reason == "length"
            assert request.output_ids == continued(request.prompt_ids, request.max_tokens)


def test_a_long_prompt_never_starves_running_answers():
    machine = Machine(pages=64, page_size=4, budget=8)
    streams = [make_request([i], 30) for i in range(3)]
    for stream in streams:
        machine.scheduler.add(stream)
    machine.step()
    machine.scheduler.add(make_request(list(range(100)), 1))
    for n in range(2, 12):
        machine.step()
        assert [stream.generated for stream in streams] == [n] * 3


def test_a_prompt_of_many_pictures_encodes_a_bounded_number_of_patches_beside_an_answer():
    machine = Machine(pages=64, page_size=4, budget=200, patches=40)
    stream = make_request([1], 30)
    machine.scheduler.add(stream)
    machine.step()
    pictures = make_request(list(range(90)), 1, ((1, 4, 4),) * 5 + ((1, 8, 8),) + ((1, 4, 4),))
    machine.scheduler.add(pictures)
    encoded = []
    while pictures.state is not State.FINISHED:
        machine.step()
        encoded.append(sum(piece.cost for piece in pictures.media.encoded))
    assert encoded[:5] == [32, 64, 80, 144, 160]  # two pictures a step; the large one is alone in its own
    assert stream.generated == 1 + len(encoded)


def test_pictures_where_no_answer_waits_are_encoded_in_one_step():
    machine = Machine(pages=64, page_size=4, budget=200, patches=40)
    pictures = make_request(list(range(90)), 1, ((1, 4, 4),) * 5)
    machine.scheduler.add(pictures)
    machine.step()
    assert pictures.state is State.FINISHED


def test_prompts_fill_what_the_answers_leave_of_the_budget():
    machine = Machine(pages=64, page_size=4, budget=8)
    machine.scheduler.add(make_request([1], 10))
    machine.step()
    long = make_request(list(range(100)), 1)
    machine.scheduler.add(long)
    machine.step()
    assert long.computed == 7


def test_more_answers_than_the_budget_do_not_run_at_once():
    machine = Machine(pages=64, page_size=4, budget=2)
    requests = [make_request([i, i], 3) for i in range(4)]
    for request in requests:
        machine.scheduler.add(request)
    while machine.step():
        assert len(machine.scheduler.running) <= 2
    assert all(r.finish_reason == "length" for r in requests)


def test_the_youngest_gives_up_its_pages_and_is_computed_again():
    machine = Machine(pages=4, page_size=2, budget=16)
    old, young = make_request([1, 2], 6), make_request([3, 4], 6)
    machine.scheduler.add(old)
    machine.scheduler.add(young)
    preempted = False
    while machine.step():
        preempted |= young.state is State.WAITING and young.generated > 0
        assert old.state is not State.WAITING
    assert preempted
    assert old.output_ids == continued([1, 2], 6)
    assert young.output_ids == continued([3, 4], 6)


def test_a_request_larger_than_the_whole_cache_is_refused_with_both_sizes():
    machine = Machine(pages=3, page_size=4, budget=8)
    with pytest.raises(RequestError, match=r"needs 14 tokens .*prompt 9 \+ max_tokens 5.*cache holds 12"):
        machine.scheduler.add(make_request([0] * 9, 5))
    machine.scheduler.add(make_request([0] * 9, 3))


def test_a_running_sequence_lies_in_consecutive_pages():
    machine = Machine(pages=64, page_size=2, budget=64)
    requests = [make_request([i] * 10, 30) for i in range(2)]
    for request in requests:
        machine.scheduler.add(request)
    for _ in range(25):
        machine.step()
        for request in requests:
            assert request.pages == list(range(request.pages[0], request.pages[0] + len(request.pages)))


def test_finishing_twice_changes_nothing():
    machine = Machine(pages=4, page_size=2, budget=8)
    request = make_request([1], 1)
    machine.scheduler.add(request)
    machine.step()
    machine.scheduler.finish(request, "cancelled")
    assert request.finish_reason == "length"
    assert machine.scheduler.pool.free == 4
