"""Many streams at once on one small machine: nothing fails, nothing is left behind, and together they are faster."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time

import httpx
import psutil
import pytest
import torch
from serving import Running, record, serving

from openm3.engine import LLM

PATH = "/v1/chat/completions"
WORDS = ["the", "code", "of", "a", "blue", "lantern", "and", "green", "kite", "was", "on", "that", "red", "door"]


def body(rng: random.Random, tokens: int) -> dict:
    text = " ".join(rng.choices(WORDS, k=rng.choice((5, 20, 80))))
    return {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "seed": rng.getrandbits(30),
            "temperature": 2, "top_p": 1, "top_k": 0, "reasoning_effort": "none", "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip


async def stream(client: httpx.AsyncClient, request: dict) -> int:
    """Tokens of one streamed answer; it must be whole."""
    async with client.stream("POST", PATH, json=request) as answer:
        assert answer.status_code == 200
        events = [line[6:] async for line in answer.aiter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return json.loads(events[-2])["usage"]["completion_tokens"]


async def load(running: Running, streams: int, seconds: float, tokens: tuple[int, ...], seed: int) -> tuple[int, int]:
    """(answers, tokens) of so many streams that ask again and again until the time is over."""
    counts: list[int] = []
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(base_url=running.url, timeout=600, limits=limits) as client:

        async def one(rng: random.Random) -> None:
            while time.monotonic() < end:
                counts.append(await stream(client, body(rng, rng.choice(tokens))))

        await asyncio.gather(*(one(random.Random(seed * 1000 + i)) for i in range(streams)))
    return len(counts), sum(counts)


def test_streams_together_are_whole_and_leave_nothing(running):
    answers, tokens = asyncio.run(load(running, 24, 0.5, (4, 12), seed=1))
    assert answers >= 24
    assert tokens > 2 * answers
    running.idle()


@pytest.mark.soak
def test_64_streams_for_5_minutes():
    """No error, pages and memory return, and at least three times the throughput of one stream at a time."""
    torch.set_num_threads(os.cpu_count() or 1)
    llm = LLM("openm3-nano", cache_tokens=64 * 2048)
    with serving(lambda: llm) as running:
        asyncio.run(load(running, 64, 10, (32, 128), seed=2))  # warm: what is allocated once is there
        running.idle(60)
        begun, process = time.monotonic(), psutil.Process()
        _, alone = asyncio.run(load(running, 1, 20, (32, 128, 256), seed=3))
        single = alone / (time.monotonic() - begun)
        resident, begun = process.memory_info().rss, time.monotonic()
        answers, tokens = asyncio.run(load(running, 64, 300, (32, 128, 256), seed=4))
        together = tokens / (time.monotonic() - begun)
        running.idle(60)
        grown = process.memory_info().rss - resident
    record("64 streams for 5 minutes", answers=answers, tokens_per_second=round(together),
           one_at_a_time=round(single), more_megabytes=round(grown / 1e6))  # fmt: skip
    assert together >= 3 * single
    assert grown < 200e6


@pytest.mark.soak
def test_a_second_turn_about_a_document_starts_ten_times_sooner():
    llm = LLM("openm3-nano", cache_tokens=40_000)
    with serving(lambda: llm) as running, httpx.Client(base_url=running.url, timeout=300) as client:
        rng = random.Random(5)
        document = " ".join(rng.choices(WORDS, k=3700))
        talk = [{"role": "user", "content": document + " What is the code of the red door?"}]

        def first_token() -> tuple[float, dict]:
            begun = time.monotonic()
            answer = client.post(PATH, json={"messages": talk, "max_tokens": 1, "reasoning_effort": "none"}).json()
            return time.monotonic() - begun, answer

        client.post(PATH, json={"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 2})
        first, answer = first_token()
        talk += [answer["choices"][0]["message"], {"role": "user", "content": "And of the kite?"}]
        second, again = first_token()
    prompt, cached = answer["usage"]["prompt_tokens"], again["usage"]["prompt_tokens_details"]["cached_tokens"]
    record("a second turn about a document", prompt_tokens=prompt, cached_tokens=cached,
           first_turn_seconds=round(first, 2), second_turn_seconds=round(second, 3))  # fmt: skip
    assert prompt >= 4000
    assert cached > 0.95 * prompt
    assert first >= 10 * second
