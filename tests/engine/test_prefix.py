"""Prefix reuse: what is shared is equal, what differs is not shared, and nothing is lost, leaked or answered twice."""

from collections import Counter

import torch
from engine_tiny import continued, next_token
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from openm3.engine.pages import PagePool
from openm3.engine.request import Media, MediaItem, Request, SamplingParams, State
from openm3.engine.scheduler import ScheduledBatch, Scheduler

PLAIN = SamplingParams()
FEW = 3  # different tokens, so that prompts often agree


class Lifecycle(RuleBasedStateMachine):
    """Requests of few different tokens, so that they share prefixes, arrive, are cancelled and fail at any time.

    Pages store the tokens written to them; a token is computed only from what a request's pages hold, so that a page
    shared wrongly, or overwritten while it is shared, gives a wrong answer.
    """

    @initialize(pages=st.integers(2, 14), size=st.integers(1, 3), budget=st.integers(1, 12), running=st.integers(1, 6))
    def start(self, pages, size, budget, running):
        self.scheduler = Scheduler(PagePool(pages), size, max_batch_tokens=budget, max_running=running)
        self.slots: dict[tuple[int, int], int] = {}
        self.requests: list[Request] = []
        self.failed: set[int] = set()
        self.ended: Counter[int] = Counter()

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20), n=st.integers(1, 12), priority=st.integers(0, 2),
          copies=st.integers(1, 3))  # fmt: skip
    def arrive(self, tokens, n, priority, copies):
        room = self.scheduler.capacity
        tokens = tokens[: room - 1]
        for _ in range(copies):
            request = Request(tokens, PLAIN, min(n, room - len(tokens)), priority=priority)
            self.scheduler.add(request)
            self.requests.append(request)

    @rule(pick=st.integers(0, 99))
    def cancel(self, pick):
        alive = [r for r in self.requests if r.state is not State.FINISHED]
        if alive:
            self.end(alive[pick % len(alive)], "cancelled")

    @rule()
    def turn(self):
        """A conversation goes on: the prompt of an answered request, its answer, and something new."""
        done = [r for r in self.requests if r.finish_reason == "length" and len(r.token_ids) + 3 < 24]
        if done and len(done[-1].token_ids) + 2 <= self.scheduler.capacity:
            self.scheduler.add(request := Request([*done[-1].token_ids, 1], PLAIN, 1))
            self.requests.append(request)

    @rule(fails=st.booleans(), pick=st.integers(0, 99))
    def step(self, fails=False, pick=0):
        batch = self.scheduler.schedule()
        if batch is None:
            assert not self.scheduler.running
            assert not self.scheduler.waiting
            return
        size = self.scheduler.page_size
        assert batch.tokens <= self.scheduler.max_batch_tokens
        if fails:  # the step breaks after some pages were written; one request is at fault, the others go on
            self.write(batch.chunks[: pick % len(batch.chunks)])
            self.end(batch.chunks[pick % len(batch.chunks)].request, "error")
            batch = ScheduledBatch([c for c in batch.chunks if c.request.state is State.RUNNING])
        self.write(batch.chunks)
        tokens = []
        for chunk in batch.chunks:
            pages = chunk.request.pages
            stored = [self.slots[pages[i // size], i % size] for i in range(chunk.end)]
            assert stored == chunk.request.token_ids[: chunk.end]
            if chunk.samples:
                tokens.append(next_token(stored, FEW))
        answered = batch.sampling
        self.scheduler.advance(batch, tokens)
        for request in answered:
            if request.generated == request.max_tokens:
                self.end(request, "length")

    def write(self, chunks):
        size = self.scheduler.page_size
        for chunk in chunks:
            for i in range(chunk.start, chunk.end):
                page = chunk.request.pages[i // size]
                assert self.scheduler.pool.holders(page) == 1, "a shared page is written to"
                self.slots[page, i % size] = chunk.request.token_ids[i]

    def end(self, request, reason):
        self.scheduler.finish(request, reason)
        self.ended[id(request)] += 1

    @invariant()
    def reference_counts_are_exact(self):
        if not hasattr(self, "scheduler"):
            return
        pool = self.scheduler.pool
        held = Counter(page for request in self.scheduler.running for page in request.pages)
        assert [pool.holders(page) for page in range(pool.num_pages)] == [held[p] for p in range(pool.num_pages)]
        assert pool.free + len(held) == pool.num_pages
        assert all(not r.pages for r in self.requests if r.state is not State.RUNNING)

    @invariant()
    def nobody_is_lost_or_answered_twice(self):
        if not hasattr(self, "scheduler"):
            return
        waiting, running = self.scheduler.waiting, self.scheduler.running
        for request in self.requests:
            places = waiting.count(request) + running.count(request) + (request.state is State.FINISHED)
            assert places == 1
            assert self.ended[id(request)] == (request.state is State.FINISHED)
        assert [*waiting] == sorted(waiting, key=lambda r: (-r.priority, r.arrival))

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for _ in range(20_000):
            if not (self.scheduler.waiting or self.scheduler.running):
                break
            self.step()
        assert self.scheduler.pool.free == self.scheduler.pool.num_pages
        for request in self.requests:
            assert request.state is State.FINISHED
            if request.finish_reason == "length":
                assert request.output_ids == continued(request.prompt_ids, request.max_tokens, FEW)
            assert request.cached < len(request.prompt_ids)


Lifecycle.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
TestLifecycle = Lifecycle.TestCase


def run(scheduler: Scheduler, *requests: Request) -> list[int]:
    """Computes requests to their end; the tokens computed in each step."""
    sizes = []
    for request in requests:
        scheduler.add(request)
    while batch := scheduler.schedule():
        sizes.append(batch.tokens)
        answered = batch.sampling
        scheduler.advance(batch, [next_token(r.token_ids, FEW) for r in answered])
        for request in answered:
            if request.generated == request.max_tokens:
                scheduler.finish(request, "length")
    return sizes


def test_a_second_turn_computes_only_what_is_new():
    scheduler = Scheduler(PagePool(64), 4)
    first = Request([*range(41)], PLAIN, 8)
    assert run(scheduler, first)[0] == 41
    second = Request([*first.token_ids, 7, 7, 7], PLAIN, 1)
    assert run(scheduler, second) == [52 - 48]
    assert (first.cached, second.cached) == (0, 48)


def test_the_last_token_of_a_prompt_is_always_computed():
    scheduler = Scheduler(PagePool(64), 4)
    run(scheduler, Request([*range(40)], PLAIN, 1))
    again = Request([*range(40)], PLAIN, 1)
    assert run(scheduler, again) == [4]
    assert again.cached == 36


def test_many_answers_to_one_prompt_share_its_pages_and_compute_it_once():
    scheduler = Scheduler(PagePool(64), 4, max_batch_tokens=16)
    requests = [Request([*range(40)], PLAIN, 4) for _ in range(5)]
    for request in requests:
        scheduler.add(request)
    held, computed = 0, 0
    while batch := scheduler.schedule():
        computed += sum(c.tokens for c in batch.chunks if c.start < 40)
        held = max(held, scheduler.pool.num_pages - scheduler.pool.free)
        answered = batch.sampling
        scheduler.advance(batch, [next_token(r.token_ids, FEW) for r in answered])
        for request in answered:
            if request.generated == 4:
                scheduler.finish(request, "length")
    assert computed == 40 + 4 * 4
    assert held == 9 + 5 * 2  # the prompt's first nine blocks once; the last one, and the answer's, of each


def test_the_longest_unused_sequence_is_forgotten_first_and_from_its_end():
    scheduler = Scheduler(PagePool(12), 4)
    for base in (100, 200):
        run(scheduler, Request([*range(base, base + 20)], PLAIN, 1))
    run(scheduler, Request([*range(300, 316)], PLAIN, 1))  # five pages: two are empty, three are the first one's
    again = Request([*range(100, 120)], PLAIN, 1)
    other = Request([*range(200, 220)], PLAIN, 1)
    scheduler.add(other)
    scheduler.schedule()
    assert other.cached == 16
    scheduler.finish(other, "cancelled")
    scheduler.add(again)
    scheduler.schedule()
    assert again.cached == 8


def test_a_preempted_request_finds_its_pages_again():
    scheduler = Scheduler(PagePool(13), 4)
    low, high = Request([*range(24)], PLAIN, 8), Request([*range(50, 70)], PLAIN, 4, priority=1)
    scheduler.add(low)
    scheduler.advance(scheduler.schedule(), [1])
    scheduler.add(high)
    batch = scheduler.schedule()
    assert {c.request for c in batch.chunks} == {low, high}  # both fit
    scheduler.advance(batch, [1] * len(batch.sampling))
    huge = Request([*range(90, 110)], PLAIN, 4, priority=2)
    scheduler.add(huge)
    batch = scheduler.schedule()
    assert low.state is State.WAITING  # the lowest made room
    assert high.state is huge.state is State.RUNNING
    scheduler.finish(high, "cancelled")
    scheduler.finish(huge, "cancelled")
    [chunk] = scheduler.schedule().chunks
    assert chunk.request is low
    assert chunk.start == 8  # of its six blocks four were needed since
    assert low.cached == 0  # no one else had computed it


def test_a_higher_priority_goes_first_and_takes_no_room_in_vain():
    scheduler = Scheduler(PagePool(4), 4, max_running=1)
    first, low, high = (Request([i] * 8, PLAIN, 2, priority=p) for i, p in ((1, 0), (2, 0), (3, 1)))
    for request in (first, low, high):
        scheduler.add(request)
    assert [c.request for c in scheduler.schedule().chunks] == [high]
    later = Request([4] * 8, PLAIN, 2, priority=1)
    scheduler.add(later)
    scheduler.schedule()
    assert [high] == scheduler.running  # one of its own priority is not put aside


def with_picture(digests: str, rows: list[int]) -> Request:
    items = [MediaItem(None, torch.tensor([[1, 4, 4]]), 4, digest) for digest in digests]
    ids = [1, 1, *[9] * len(rows), 2, 2]
    return Request(ids, PLAIN, 1, media=Media(items, [*range(2, 2 + len(rows))], rows))


def test_pictures_are_shared_by_what_they_show_and_by_the_place_in_it():
    scheduler = Scheduler(PagePool(64), 4)
    rows = [*range(8)]
    run(scheduler, with_picture("ab", rows))
    for request, cached in (
        (with_picture("ab", rows), 8),
        (with_picture("ac", rows), 4),  # the first block shows a's first two rows only
        (with_picture("ca", rows), 0),
        (with_picture("ba", [4, 5, 6, 7, 0, 1, 2, 3]), 8),  # a before b, however they are listed
        (with_picture("ab", [1, 0, *range(2, 8)]), 0),
    ):
        run(scheduler, request)
        assert request.cached == cached
    plain = Request(with_picture("ab", rows).prompt_ids, PLAIN, 1)
    run(scheduler, plain)
    assert plain.cached == 0


def test_a_prompt_whose_log_probabilities_are_wanted_is_computed_whole():
    scheduler = Scheduler(PagePool(64), 4)
    run(scheduler, Request([*range(20)], PLAIN, 1))
    assert run(scheduler, Request([*range(20)], SamplingParams(prompt_logprobs=0), 1)) == [20]


def test_a_short_prompt_does_not_wait_for_a_long_one_before_it():
    scheduler = Scheduler(PagePool(512), 4, max_batch_tokens=16)
    long, short = Request([*range(1000)], PLAIN, 1), Request([5] * 12, PLAIN, 1)
    scheduler.add(long)
    scheduler.add(short)
    shares = []
    while short.computed < 11:
        batch = scheduler.schedule()
        shares.append({c.request: c.tokens for c in batch.chunks})
        scheduler.advance(batch, [0] * len(batch.sampling))
    assert len(shares) == 2
    assert all(share[long] >= 8 for share in shares)
