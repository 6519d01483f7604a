"""The engine's loop with a fake model: endings, faults inside a step, interrupts at any line."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openm3.engine.core import Engine
from openm3.engine.output import TextOutput
from openm3.engine.request import Request, SamplingParams, State

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

    def run(self, batch):
        self.calls += 1
        if self.calls in self.fail:
            raise self.fail[self.calls]
        chosen = [next_token(request.token_ids) for request in batch.sampling]
        return torch.nn.functional.one_hot(torch.tensor(chosen, dtype=torch.int64), VOCAB).float()


class Letters:
    def push(self, token: int) -> str:
        return chr(ord("0") + token)

    def flush(self) -> str:
        return ""


def make_engine(fail=None, pages=8) -> Engine:
    return Engine(FakeRunner(fail), num_pages=pages, page_size=4, max_batch_tokens=6)


def make_request(prompt, max_tokens, eos=(), stop=()) -> Request:
    return Request(prompt, GREEDY, max_tokens, eos_ids=frozenset(eos), output=TextOutput(Letters(), stop))


def run(engine: Engine) -> None:
    while engine.step():
        pass


def test_an_answer_ends_at_eos_which_is_no_text():
    tokens = answer([1, 2], 10)
    at = next(i for i in range(3, 10) if tokens[i] not in tokens[:i])
    engine, request = make_engine(), make_request([1, 2], 20, eos=[tokens[at]])
    engine.add(request)
    run(engine)
    assert request.finish_reason == "stop"
    assert request.output_ids == tokens[: at + 1]
    assert request.output.take() == "".join(chr(ord("0") + t) for t in tokens[:at])


def test_an_answer_ends_at_max_tokens_with_all_its_text():
    engine, request = make_engine(), make_request([1, 2], 7, stop=("never",))
    engine.add(request)
    run(engine)
    assert request.finish_reason == "length"
    assert len(request.output.take()) == request.generated == 7


def test_an_answer_ends_before_its_stop_string():
    text = "".join(chr(ord("0") + t) for t in answer([1, 2], 10))
    engine, request = make_engine(), make_request([1, 2], 20, stop=(text[4:7],))
    engine.add(request)
    run(engine)
    assert request.finish_reason == "stop"
    assert request.output.take() == text[: text.index(text[4:7])]
    assert engine.scheduler.pool.free == 8


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_an_exception_inside_the_model_costs_nothing_but_the_step(error):
    engine = make_engine(fail={3: error})
    requests = [make_request([i, 1], 6) for i in range(3)]
    for request in requests:
        engine.add(request)
    with pytest.raises(type(error)):
        run(engine)
    engine.cancel(requests[0])
    run(engine)
    assert requests[0].finish_reason == "cancelled"
    assert [r.output_ids for r in requests[1:]] == [answer(r.prompt_ids, 6) for r in requests[1:]]
    assert engine.scheduler.pool.free == 8


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
@given(line=st.integers(1, 900), cancels=st.booleans())
def test_pages_come_back_from_an_interrupt_at_any_line(line, cancels):
    engine = make_engine(pages=5)
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
