"""One bundled model for all of these tests, and one server of it for those that need no other settings."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import openai
import pytest
from serving import Running, serving

from openm3.engine import LLM


@pytest.fixture(scope="session")
def llm() -> LLM:
    import torch

    torch.set_num_threads(1)
    return LLM("openm3-nano", cache_tokens=40_000, max_batch_tokens=512)


@pytest.fixture(scope="session")
def running(llm: LLM) -> Iterator[Running]:
    with serving(lambda: llm) as server:
        yield server


@pytest.fixture(scope="session")
def bounded() -> Iterator[Running]:
    """A server whose cache holds 1,024 tokens: no answer is longer, whatever a random request asks for."""
    with serving(lambda: LLM("openm3-nano", cache_tokens=1024, max_batch_tokens=512)) as server:
        yield server


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made
    running.idle()


@pytest.fixture
def claude(running: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0, timeout=60) as made:
        yield made
    running.idle()
