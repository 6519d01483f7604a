"""The engine behind asyncio: every request is answered once, and what befalls one befalls no other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from openm3.engine import LLM, Finish, RequestError, SamplingParams
from openm3.engine.service import Busy, Service, StepFailed, Stream, Unavailable
from openm3.processing import ContentDelta

HELLO = [{"role": "user", "content": "Hello!"}]
SHORT = SamplingParams(temperature=0, max_tokens=8)
LONG = SamplingParams(seed=1, max_tokens=400)


@pytest.fixture(scope="module")
def llm(random_nano) -> LLM:
    return LLM(random_nano, cache_tokens=20_000)


@pytest.fixture
def service(llm: LLM) -> Iterator[Service]:
    made = Service(lambda: llm, max_requests=8)
    made.start()
    made.wait(60)
    yield made
    assert made.close()
    stats = made.stats()
    assert (stats.running, stats.waiting, stats.pages_free, made.under_way) == (0, 0, stats.pages, 0)


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(60):
            return await work()

    return asyncio.run(bounded())


async def text_of(stream: Stream) -> tuple[str, Finish]:
    events = [event async for event in stream]
    assert sum(isinstance(event, Finish) for event in events) == 1
    return "".join(e.text for e in events if isinstance(e, ContentDelta)), events[-1]


def test_answers_are_those_of_the_model_in_process(service, llm):
    expected = LLM.chat(llm, HELLO, SHORT, thinking="disabled")

    async def work() -> list[Any]:
        streams = await service.chat(HELLO, replace(SHORT, n=3), thinking="disabled")
        return await asyncio.gather(*map(text_of, streams))

    for text, end in run(work):
        assert (text, end) == (expected.content, Finish("length", expected.prompt_tokens, 8))


def test_texts_and_ids_are_continued(service, llm):
    ids = llm.processor.tokenizer.encode("The colour of")
    expected = llm.generate("The colour of", SHORT)[0].text

    async def work() -> list[str]:
        streams = await service.complete(["The colour of", ids], SHORT)
        return [text for text, _ in await asyncio.gather(*map(text_of, streams))]

    assert run(work) == [expected, expected]


def test_a_cancelled_stream_ends_and_gives_its_pages_back(service):
    async def work() -> Finish:
        [stream] = await service.chat(HELLO, LONG)
        first = await anext(stream)
        assert not isinstance(first, Finish)
        stream.cancel()
        stream.cancel()
        _, end = await text_of(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        return end

    end = run(work)
    assert end.finish_reason == "cancelled"
    assert end.completion_tokens < 400


def test_too_many_requests_and_those_that_do_not_fit_are_refused(service):
    async def work() -> None:
        streams = await service.chat(HELLO, replace(LONG, n=7))
        with pytest.raises(Busy, match="at most 8"):
            await service.chat(HELLO, replace(SHORT, n=2))
        with pytest.raises(RequestError, match="max_position_embeddings"):
            await service.complete([[5] * 20_000], SHORT)
        with pytest.raises(RequestError, match="token 999999"):
            await service.complete([[999999]], SHORT)
        assert service.under_way == 7
        [one] = await service.chat(HELLO, SHORT)
        await text_of(one)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*map(text_of, streams))

    run(work)


def test_a_failed_step_fails_what_it_computed_and_nothing_after(service, llm, monkeypatch):
    healthy = llm.engine.runner.run
    monkeypatch.setattr(llm.engine.runner, "run", lambda batch: 1 / 0)

    async def fails() -> None:
        [stream] = await service.chat(HELLO, SHORT)
        with pytest.raises(StepFailed, match="ZeroDivisionError"):
            await text_of(stream)

    run(fails)
    monkeypatch.setattr(llm.engine.runner, "run", healthy)

    async def works() -> str:
        [stream] = await service.chat(HELLO, SHORT)
        return (await text_of(stream))[1].finish_reason

    assert run(works) == "length"


def test_a_drained_service_finishes_what_runs_and_takes_nothing_new(service):
    async def work() -> None:
        [stream] = await service.chat(HELLO, SamplingParams(seed=1, max_tokens=60))
        draining = asyncio.ensure_future(service.drain(30))
        await asyncio.sleep(0)
        assert not service.ready
        with pytest.raises(Unavailable, match="shutting down"):
            await service.chat(HELLO, SHORT)
        _, end = await text_of(stream)
        assert end.finish_reason in ("length", "stop")
        assert await draining

    run(work)


def test_closing_cancels_what_is_under_way(llm):
    service = Service(lambda: llm)
    service.start()
    service.wait(60)

    async def work() -> str:
        [stream] = await service.chat(HELLO, LONG)
        await anext(stream)
        assert not await service.drain(0.01)
        assert await asyncio.to_thread(service.close)
        return (await text_of(stream))[1].finish_reason

    assert run(work) == "cancelled"


def test_readers_whose_loop_is_gone_hold_nothing(service):
    async def leave() -> None:
        await service.chat(HELLO, replace(LONG, n=4))

    run(leave)
    end = time.monotonic() + 30
    while service.under_way:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_model_that_cannot_be_loaded_is_told():
    def load() -> LLM:
        raise ValueError("no such model")

    service = Service(load)
    with pytest.raises(Unavailable, match="loading"):
        service.stats()
    service.start()
    with pytest.raises(ValueError, match="no such model"):
        service.wait(10)
    assert not service.ready
    with pytest.raises(Unavailable, match="failed"):
        run(lambda: service.chat(HELLO, SHORT))
    assert service.close()
