"""The engine's loop with a fake model: endings, faults inside a step, interrupts at any line."""

import sys
from contextlib import nullcontext, suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from openm3.engine import core
from openm3.engine.core import Engine
from openm3.engine.output import TextOutput
from openm3.engine.request import Media, MediaItem, Request, SamplingParams, State

VOCAB = 64
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0)


def next_token(tokens: list[int]) -> int:
    return hash(tuple(tokens)) % VOCAB


def answer(prompt: list[int], n: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeRunner:
    """The next token is a hash of all before it; `fail` raises in the given call."""

    def __init__(self, fail: dict[int, BaseException] | None = None) -> None:
        self.calls, self.fail = 0, fail or {}

    def run(self, batch, tokens=None):
        self.calls += 1
        if self.calls in self.fail:
            raise self.fail[self.calls]
        assert all(len(chunk.request.pages) * 4 >= chunk.end for chunk in batch.chunks)
        newest = [[]] * len(batch.sampling) if tokens is None else [[token] for token in tokens.tolist()]
        chosen = [next_token(request.token_ids + new) for request, new in zip(batch.sampling, newest, strict=True)]
        return torch.nn.functional.one_hot(torch.tensor(chosen, dtype=torch.int64), VOCAB).float()


class Letters:
    def push(self, token: int) -> str:
        return chr(ord("0") + token)

    def flush(self) -> str:
        return ""


def make_engine(fail=None, pages=8, ahead=False) -> Engine:
    return Engine(FakeRunner(fail), num_pages=pages, page_size=4, max_batch_tokens=6, ahead=ahead)


each_way = pytest.mark.parametrize("ahead", [False, True], ids=["a step at a time", "a step ahead"])


def make_request(prompt, max_tokens, eos=(), stop=()) -> Request:
    return Request(prompt, GREEDY, max_tokens, eos_ids=frozenset(eos), output=TextOutput(Letters(), stop))


def run(engine: Engine) -> None:
    while engine.step():
        pass


@each_way
def test_an_answer_ends_at_eos_which_is_no_text(ahead):
    tokens = answer([1, 2], 10)
    at = next(i for i in range(3, 10) if tokens[i] not in tokens[:i])
    engine, request = make_engine(ahead=ahead), make_request([1, 2], 20, eos=[tokens[at]])
    engine.add(request)
    run(engine)
    assert request.finish_reason == "stop"
    assert request.output_ids == tokens[: at + 1]
    assert request.output.take() == "".join(chr(ord("0") + t) for t in tokens[:at])


@each_way
def test_an_answer_ends_at_max_tokens_with_all_its_text(ahead):
    engine, request = make_engine(ahead=ahead), make_request([1, 2], 7, stop=("never",))
    engine.add(request)
    run(engine)
    assert request.finish_reason == "length"
    assert len(request.output.take()) == request.generated == 7


@each_way
def test_an_answer_ends_before_its_stop_string(ahead):
    text = "".join(chr(ord("0") + t) for t in answer([1, 2], 10))
    engine, request = make_engine(ahead=ahead), make_request([1, 2], 20, stop=(text[4:7],))
    engine.add(request)
    run(engine)
    assert request.finish_reason == "stop"
    assert request.output.take() == text[: text.index(text[4:7])]
    assert engine.scheduler.pool.free == 8


def shown(request) -> str:
    return "".join(request.output.ready)


class Seeing(FakeRunner):
    """Notes what each call computes, and how much of it the answers' texts show by then."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def run(self, batch, tokens=None):
        self.seen.append([(c.request.seed, c.start, c.end, len(shown(c.request))) for c in batch.chunks])
        return super().run(batch, tokens)


def test_a_token_becomes_text_while_the_next_step_runs():
    engine, request = make_engine(ahead=True), make_request([1, 2], 4)
    engine.runner = Seeing()
    engine.add(request)
    for n in range(1, 5):
        assert engine.step()
        assert request.generated == len(shown(request)) == n
    # Each step but the first began before the one before was text, and none after the last token.
    assert engine.runner.seen == [[(0, 0, 2, 0)], [(0, 2, 3, 0)], [(0, 3, 4, 1)], [(0, 4, 5, 2)]]
    assert request.output_ids == answer([1, 2], 4)
    assert not engine.step()


def test_who_ended_is_left_out_of_the_step_ahead_and_who_comes_is_in_the_next():
    engine, (one, two, late) = make_engine(ahead=True), [make_request([i, 1], 6) for i in range(3)]
    for request in (one, two):
        engine.add(request)
    engine.step()
    engine.step()
    engine.cancel(one)
    engine.add(late)
    engine.step()
    assert [r.generated for r in (one, two, late)] == [2, 3, 0]  # it had begun without the late one
    run(engine)
    assert one.output_ids == answer([0, 1], 6)[:2]
    assert two.output_ids == answer([1, 1], 6)
    assert late.output_ids == answer([2, 1], 6)
    assert engine.scheduler.pool.free == 8


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("odd")])
def test_a_step_ahead_of_tokens_that_nobody_got_is_forgotten(error, monkeypatch):
    engine, (one, two, late) = make_engine(ahead=True), [make_request([i, 1], 6) for i in range(3)]
    engine.add(one)
    engine.add(two)
    engine.step()
    wrong, right = [error], engine._records
    monkeypatch.setattr(engine, "_records", lambda *args: raise_once(wrong, right, args))
    with pytest.raises(KeyboardInterrupt) if isinstance(error, KeyboardInterrupt) else nullcontext():
        engine.step()
    engine.add(late)
    run(engine)
    for i, request in enumerate((one, two, late)):
        assert request.output_ids == answer([i, 1], 6)
    assert engine.scheduler.pool.free == 8


def raise_once(errors: list, otherwise, args):
    if errors:
        raise errors.pop()
    return otherwise(*args)


def test_answers_go_ahead_while_others_find_no_room_who_enter_as_soon_as_there_is_some():
    engine, requests = make_engine(ahead=True, pages=4), [make_request([i, 1, 2], n) for i, n in enumerate((9, 13, 5))]
    for request in requests:
        engine.add(request)
    given = []
    while engine.step():
        given.append(engine._begun is not None and requests[2].state is State.WAITING)
    assert any(given)
    for i, request in enumerate(requests):
        assert request.output_ids == answer([i, 1, 2], request.max_tokens)


def test_a_step_ahead_takes_no_page_from_anyone():
    engine, requests = make_engine(ahead=True, pages=3), [make_request([i, 1, 2], 6) for i in range(2)]
    for request in requests:
        engine.add(request)
    run(engine)  # nine tokens each want three pages each
    for i, request in enumerate(requests):
        assert request.output_ids == answer([i, 1, 2], 6)
    assert engine.scheduler.preemptions > 0
    assert engine.scheduler.pool.free == 3


@each_way
def test_an_interrupt_inside_the_model_costs_nothing_but_the_step(ahead):
    engine = make_engine(fail={3: KeyboardInterrupt()}, ahead=ahead)
    requests = [make_request([i, 1], 6) for i in range(3)]
    for request in requests:
        engine.add(request)
    with pytest.raises(KeyboardInterrupt):
        run(engine)
    engine.cancel(requests[0])
    run(engine)
    assert requests[0].finish_reason == "cancelled"
    assert [r.output_ids for r in requests[1:]] == [answer(r.prompt_ids, 6) for r in requests[1:]]
    assert engine.scheduler.pool.free == 8


@each_way
def test_an_error_that_does_not_come_again_costs_nobody_anything(ahead):
    engine = make_engine(fail={3: RuntimeError("odd")}, ahead=ahead)
    requests = [make_request([i, 1], 6) for i in range(3)]
    for request in requests:
        engine.add(request)
    run(engine)
    assert [r.output_ids for r in requests] == [answer(r.prompt_ids, 6) for r in requests]


class Poisoned(FakeRunner):
    """Raises wherever a bad request reaches its third token."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.bad = bad

    def run(self, batch, tokens=None):
        if any(c.request.prompt_ids[0] in self.bad and c.end > 2 for c in batch.chunks):
            raise RuntimeError("poisoned")
        return super().run(batch, tokens)


@given(st.sets(st.integers(0, 6), max_size=7), st.integers(4, 40), st.booleans())
def test_an_error_fails_the_requests_it_is_about_and_no_other(bad, pages, ahead):
    engine = Engine(Poisoned(bad), num_pages=pages, page_size=4, max_batch_tokens=9, ahead=ahead)
    requests = [make_request([i, 1], 6) for i in range(7)]
    for request in requests:
        engine.add(request)
    run(engine)
    for i, request in enumerate(requests):
        if i in bad:
            assert request.finish_reason == "error"
            assert str(request.error) == "poisoned"
        else:
            assert request.finish_reason == "length"
            assert request.output_ids == answer(request.prompt_ids, 6)
    assert engine.scheduler.pool.free == pages


class Small(FakeRunner):
    """Has memory for so many tokens at a time."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.refused = most, 0

    def run(self, batch, tokens=None):
        if batch.tokens > self.most:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().run(batch, tokens)


def test_out_of_memory_is_tried_again_smaller_and_remembered_for_a_while(monkeypatch):
    monkeypatch.setattr(core, "RECOVERY_STEPS", 30)
    engine = Engine(Small(5), num_pages=64, page_size=4, max_batch_tokens=64)
    requests = [make_request([*range(50)], 6), make_request([9] * 30, 6), make_request([1], 12)]
    for request in requests:
        engine.add(request)
    run(engine)
    assert [r.output_ids for r in requests] == [answer(r.prompt_ids, r.max_tokens) for r in requests]
    engine.runner.refused = 0
    late = make_request([*range(50, 1, -1)], 2)
    engine.add(late)
    run(engine)
    assert late.output_ids == answer(late.prompt_ids, 2)
    assert engine.runner.refused == 0
    engine.runner.most = 64
    for request in (make_request([5], 90), make_request([*range(2, 60)], 1)):
        engine.add(request)
        steps = 0
        while engine.step():
            steps += 1
    assert steps <= 4  # the limit has grown again: 58 tokens in a few steps


def test_where_even_one_page_has_no_room_the_request_is_refused():
    engine = Engine(Small(3), num_pages=64, page_size=4, max_batch_tokens=64)
    large, small = make_request([*range(50)], 6), make_request([1], 6)
    engine.add(large)
    engine.add(small)
    run(engine)
    assert isinstance(large.error, torch.OutOfMemoryError)
    assert small.output_ids == answer([1], 6)
    assert engine.scheduler.pool.free == 64


class Broken(Letters):
    def push(self, token: int) -> str:
        raise UnicodeError("no such text")


@each_way
def test_an_error_in_a_request_s_text_fails_that_request_alone(ahead):
    engine = make_engine(ahead=ahead)
    bad, good = make_request([1, 2], 6), make_request([3, 2], 6)
    bad.output = TextOutput(Broken())
    engine.add(bad)
    engine.add(good)
    run(engine)
    assert (bad.finish_reason, good.finish_reason) == ("error", "length")
    assert good.output_ids == answer([3, 2], 6)


class NotNumbers(FakeRunner):
    def run(self, batch, tokens=None):
        logits = super().run(batch, tokens)
        logits[[r.prompt_ids[0] == 3 for r in batch.sampling]] = float("nan")
        return logits


class BadGuide:
    def apply(self, line, output_ids):
        if len(output_ids) == 2:
            raise RuntimeError("no token fits")

    def ended(self, output_ids):
        return False


@each_way
def test_an_error_in_a_grammar_fails_its_request_alone(ahead):
    engine = make_engine(ahead=ahead)
    bad, good = make_request([1, 2], 6), make_request([3, 2], 6)
    bad.guide = BadGuide()
    engine.add(bad)
    engine.add(good)
    run(engine)
    assert (str(bad.error), bad.generated) == ("no token fits", 2)
    assert good.output_ids == answer([3, 2], 6)


@each_way
def test_logits_that_are_not_numbers_fail_their_request_alone(ahead):
    engine = Engine(NotNumbers(), num_pages=8, page_size=4, ahead=ahead)
    warm = SamplingParams(temperature=1.0, top_p=1.0, top_k=0)
    bad = Request([3], warm, 5, output=TextOutput(Letters()))
    good = make_request([4], 5)
    engine.add(bad)
    engine.add(good)
    run(engine)
    assert isinstance(bad.error, ArithmeticError)
    assert good.output_ids == answer([4], 5)


@each_way
def test_a_request_ends_at_its_deadline_waiting_or_running(ahead):
    now = [0.0]
    engine = Engine(FakeRunner(), num_pages=8, page_size=4, clock=lambda: now[0], ahead=ahead)
    running, waiting, free = make_request([1], 30), make_request([2], 30), make_request([3], 10)
    running.deadline = waiting.deadline = 5.0
    for request in (running, free):
        engine.add(request)
    for now[0] in (1.0, 2.0, 4.9):
        engine.step()
    engine.add(waiting)
    now[0] = 5.0
    engine.step()
    assert [r.finish_reason for r in (running, waiting, free)] == ["deadline", "deadline", None]
    assert running.generated == 3
    run(engine)
    assert free.output_ids == answer([3], 10)
    assert engine.scheduler.pool.free == 8


class Timed(FakeRunner):
    """Takes a millisecond for each token, and two for each patch of a picture."""

    def __init__(self, now: list[float]) -> None:
        super().__init__()
        self.now = now

    def run(self, batch, tokens=None):
        self.now[0] += 0.001 * batch.tokens + 0.002 * batch.patches
        for chunk in batch.chunks:
            if chunk.request.media:
                chunk.request.media.encoded.update(chunk.request.media.missing(chunk.start, chunk.end))
        return super().run(batch, tokens)


def one_stream():
    """(an engine whose steps take the runner's time, that time, a stream of 120 tokens that has begun)"""
    now = [0.0]
    engine = Engine(Timed(now), num_pages=4096, page_size=4, max_batch_tokens=2048, token_delay=0.1,
                    clock=lambda: now[0])  # fmt: skip
    stream = make_request([1], 120)
    engine.add(stream)
    engine.step()
    return engine, now, stream


def test_a_stream_waits_no_longer_than_the_delay_for_the_prompts_of_others():
    engine, now, stream = one_stream()
    for i in range(3):
        engine.add(make_request([i] * 2000, 4))
    delays = []
    while stream.state is not State.FINISHED:
        before = now[0]
        engine.step()
        delays.append(now[0] - before)
    assert max(delays[1:]) < 0.11  # the first step is the one that measures
    assert sum(delays) > 6  # the prompts were computed meanwhile


def test_a_stream_waits_no_longer_than_the_delay_for_the_pictures_of_others():
    engine, now, stream = one_stream()
    engine.add(make_request([2] * 400, 1))
    pictures = make_request([3] * 400, 4)
    items = [MediaItem(None, torch.tensor([[1, 4, 4]]), 4, str(i)) for i in range(90)]
    pictures.media = Media(items, [*range(5, 365)], [*range(360)])
    delays = []
    while stream.state is not State.FINISHED:
        if stream.generated == 20:
            engine.add(pictures)
        before = now[0]
        engine.step()
        delays.append(now[0] - before)
    first = delays.index(max(delays))  # the step that measures what a patch takes
    assert max(delays[1:first] + delays[first + 1 :]) < 0.11
    assert pictures.generated == 4


def test_stop_token_ids_end_the_answer_like_eos():
    tokens = answer([1, 2], 10)
    at = next(i for i in range(3, 10) if tokens[i] not in tokens[:i])
    engine = make_engine()
    params = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, stop_token_ids=(tokens[at],))
    request = Request([1, 2], params, 20, output=TextOutput(Letters()))
    engine.add(request)
    run(engine)
    assert request.finish_reason == "stop"
    assert request.output.take() == "".join(chr(ord("0") + t) for t in tokens[:at])


def test_log_probabilities_are_those_of_the_logits_before_any_change():
    params = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, logprobs=2, logit_bias={7: 50})
    engine, wants, plain = make_engine(), Request([1, 2], params, 4, output=TextOutput(Letters())), make_request([1], 4)
    engine.add(wants)
    engine.add(plain)
    run(engine)
    assert wants.output_ids == [7] * 4
    assert plain.logprobs == []
    total = torch.logsumexp(torch.tensor([1.0] + [0.0] * (VOCAB - 1), dtype=torch.float64), 0).item()
    for i, record in enumerate(wants.logprobs):
        likeliest = next_token([1, 2, *wants.output_ids[:i]])
        assert record.token == 7
        assert record.logprob == pytest.approx((likeliest == 7) - total)
        assert record.top[0] == (likeliest, pytest.approx(1 - total))
        assert len(record.top) == 2


class Unreliable(FakeRunner):
    """Fails where it is told to: `next` for the next call, `bad` for whoever begins with these tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.next: BaseException | None = None
        self.bad: set[int] = set()
        self.most = 99

    def run(self, batch, tokens=None):
        error, self.next = self.next, None
        if error is not None:
            raise error
        if any(c.request.prompt_ids[0] in self.bad for c in batch.chunks):
            raise ValueError("bad")
        if batch.tokens > self.most:
            raise RuntimeError("can't allocate memory")
        return super().run(batch, tokens)


class AnyOrder(RuleBasedStateMachine):
    """Arrivals, cancels, deadlines, errors, interrupts and shortages of memory in any order."""

    @initialize(pages=st.integers(3, 12), budget=st.integers(2, 12), ahead=st.booleans())
    def start(self, pages, budget, ahead):
        self.now = 0.0
        self.runner = Unreliable()
        self.engine = Engine(self.runner, num_pages=pages, page_size=4, max_batch_tokens=budget, ahead=ahead,
                             clock=lambda: self.now)  # fmt: skip
        self.requests: list[Request] = []

    @rule(first=st.integers(0, 5), length=st.integers(1, 9), n=st.integers(1, 8), priority=st.integers(0, 1),
          lives=st.none() | st.integers(1, 9))  # fmt: skip
    def arrive(self, first, length, n, priority, lives):
        n = min(n, self.engine.scheduler.capacity - length)
        request = make_request([first, *range(length - 1)], n)
        request.priority, request.deadline = priority, None if lives is None else self.now + lives
        self.engine.add(request)
        self.requests.append(request)

    @rule(pick=st.integers(0, 99))
    def cancel(self, pick):
        if self.requests:
            self.engine.cancel(self.requests[pick % len(self.requests)])

    @rule(error=st.sampled_from([None, None, ValueError("once"), KeyboardInterrupt(), torch.OutOfMemoryError("once")]))
    def step(self, error):
        self.now += 1.0
        self.runner.next = error
        with suppress(KeyboardInterrupt):
            self.engine.step()
        self.runner.next = None

    @rule(token=st.integers(0, 5))
    def break_for(self, token):
        self.runner.bad = {token}

    @rule(most=st.integers(4, 9))
    def shrink(self, most):
        self.runner.most = most

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.runner.bad = set()
        run(self.engine)
        assert self.engine.scheduler.pool.free == self.engine.scheduler.pool.num_pages
        for request in self.requests:
            wanted = answer(request.prompt_ids, request.max_tokens)
            assert request.output_ids == wanted[: request.generated]
            assert request.output.take() == "".join(chr(ord("0") + t) for t in request.output_ids)
            assert (request.finish_reason == "length") == (request.generated == request.max_tokens)
            assert (request.error is not None) == (request.finish_reason == "error")
            assert request.finish_reason in ("length", "cancelled", "deadline", "error")
            assert request.finish_reason != "deadline" or request.deadline is not None


AnyOrder.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)
TestAnyOrder = AnyOrder.TestCase


def interrupt_at(line: int):
    """A trace function that raises KeyboardInterrupt at the n-th line run inside the engine's bookkeeping rooms."""
    seen = 0

    def trace(frame, event, _):
        nonlocal seen
        if not frame.f_code.co_filename.endswith(("engine/scheduler.py", "engine/pages.py")):
            return None
        if event == "line":
            seen += 1
            if seen == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    return trace


@settings(deadline=None, max_examples=200)
@given(line=st.integers(1, 900), cancels=st.booleans(), ahead=st.booleans())
def test_pages_come_back_from_an_interrupt_at_any_line(line, cancels, ahead):
    engine = make_engine(pages=5, ahead=ahead)
    requests = [make_request([i, 1, 2], 8) for i in range(3)]
    for request in requests:
        engine.add(request)
    tracer = sys.gettrace()
    try:
        sys.settrace(interrupt_at(line))
        for _ in range(7):
            engine.step()
        if cancels:
            engine.cancel(requests[0])
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(tracer)
    run(engine) if not cancels else [engine.cancel(request) for request in requests]
    assert engine.scheduler.pool.free == 5
    assert all(request.state is State.FINISHED for request in requests)
    late = make_request([9, 9, 9], 8)
    engine.add(late)
    run(engine)
    assert late.output_ids == answer([9, 9, 9], 8)
