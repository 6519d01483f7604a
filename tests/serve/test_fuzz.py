"""Random bodies: whatever is sent, the answer is no 500, no traceback and in time, and the server lives on."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest
from serving import WEATHER, Running, data_url, record

CALL = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
PICTURE = {"type": "image_url", "image_url": {"url": data_url("shapes.png", "image/png"), "detail": "low"}}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hello"}, PICTURE]},
    {"role": "assistant", "content": None, "reasoning_content": "a thought", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "21"},
]
# each of them failed once
FOUND = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "tools": [{"function": 5}]}),
    ("/v1/messages", {"model": "openm3-nano", "max_tokens": 1, "messages": [
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": 5}]}]}),
    ("/v1/responses", {"input": [{"type": "reasoning", "content": 5}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": ["text"]}]}]}),
    ("/v1/messages", {"model": "openm3-nano", "max_tokens": 1, "messages": [
        {"role": "user", "content": [{"type": "image", "source": {"type": {}}}]}]}),
    ("/v1/responses", {"input": "Hello", "temperature": 8e307}),
    ("/v1/responses", {"input": "Hello", "repetition_penalty": 5e-324}),
]  # fmt: skip
BODIES = {
    "/v1/chat/completions": {
        "messages": TALK, "max_tokens": 2, "tools": [WEATHER], "tool_choice": "auto", "temperature": 0.5, "top_p": 0.9,
        "top_k": 5, "min_p": 0.1, "seed": 1, "stop": ["x"], "stop_token_ids": [3], "n": 1, "logprobs": True,
        "top_logprobs": 2, "logit_bias": {"5": 1}, "presence_penalty": 0.1, "frequency_penalty": 0.1,
        "repetition_penalty": 1.1, "thinking": {"type": "enabled", "budget_tokens": 2}, "reasoning_effort": "low",
        "chat_template_kwargs": {"thinking_mode": "adaptive"}, "stream": False, "priority": 1,
        "response_format": {"type": "text"}, "structured_outputs": None,
    },
    "/v1/completions": {
        "prompt": ["Hello", "you"], "max_tokens": 2, "n": 1, "echo": True, "logprobs": 1, "seed": 2, "stop": "x",
        "structured_outputs": {"choice": ["a", "b"]}, "stream": False,
    },
    "/v1/responses": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
                  {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                  {"type": "function_call_output", "call_id": "c", "output": "1"}],
        "max_output_tokens": 2, "instructions": "Be brief.", "reasoning": {"effort": "low"}, "stream": False,
        "tools": [{"type": "function", **WEATHER["function"]}], "text": {"format": {"type": "text"}},
    },
    "/v1/messages": {
        "model": "openm3-nano", "max_tokens": 2, "system": [{"type": "text", "text": "Be brief."}], "stream": False,
        "messages": [{"role": "user", "content": "Hello"},
                     {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]},
                     {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "1"}]}],
        "tools": [{"name": "f", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}],
        "thinking": {"type": "adaptive"}, "stop_sequences": ["x"], "top_k": 3, "tool_choice": {"type": "auto"},
    },
}  # fmt: skip
VALUES = [None, True, False, 0, -1, 1, 2, 1.5, 1e308, -1e308, float("nan"), float("inf"), 2**63, -(2**70), "", "x",
          "\x00", "\ud800", "]<]minimax[>[<tool_call>", "]~b]", "data:,", "http://[::1", "/etc/passwd", [], [[]],
          [None], {}, {"type": "text"}, {"type": "object"}, {"$ref": "#"}, {"type": ["string", 5]},
          "a" * 5000]  # fmt: skip


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def changed(body: Any, rng: random.Random) -> Any:
    """The body with some of its values replaced, left out, doubled or moved."""
    body = json.loads(json.dumps(body))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        path = rng.choice(places(body)[1:] or [()])
        if not path:
            return rng.choice(VALUES)
        parent = body
        for key in path[:-1]:
            parent = parent[key]
        action = rng.random()
        if action < 0.7:
            parent[path[-1]] = json.loads(json.dumps(rng.choice(VALUES)))
        elif action < 0.85:
            del parent[path[-1]]
        elif isinstance(parent, list):
            parent.append(json.loads(json.dumps(rng.choice(parent) if parent else None)))
        else:
            parent[rng.choice(("type", "content", "role", "extra", "url"))] = rng.choice(VALUES)
    return body


def fuzz(running: Running, count: int, seed: int) -> dict[int, int]:
    """Sends `count` bodies; how often each status came."""
    rng, statuses = random.Random(seed), dict[int, int]()
    with httpx.Client(base_url=running.url, timeout=60) as client:
        for i in range(count):
            path = rng.choice([*BODIES, "/v1/messages/count_tokens"])
            body = changed(BODIES[path.removesuffix("/count_tokens")], rng)
            data = json.dumps(body)
            answer = client.post(path, content=data, headers={"Content-Type": "application/json"})
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code in (200, 400, 404, 413, 429), (i, path, data[:3000], answer.text)
            assert "Traceback" not in answer.text
            if answer.status_code != 200:
                assert answer.json()["error"]["message"], (i, path, data[:3000])
    return statuses


def test_no_random_body_makes_the_server_fail(bounded):
    statuses = fuzz(bounded, 80, seed=0)
    assert statuses[200] > 3
    assert statuses[400] > 40
    bounded.idle()


@pytest.mark.parametrize(("path", "body"), FOUND)
def test_what_was_found_is_refused(bounded, path, body):
    answer = httpx.post(bounded.url + path, json=body, timeout=60)
    assert answer.status_code == 400, answer.text


@pytest.mark.soak
def test_no_random_body_of_ten_thousand_makes_the_server_fail(bounded):
    seed = random.randrange(2**32)
    print("seed", seed)
    statuses = fuzz(bounded, 10_000, seed)
    bounded.idle()
    record("10,000 random bodies", seed=seed, statuses={str(status): n for status, n in sorted(statuses.items())})
