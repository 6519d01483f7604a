"""Keys, limits, ids, metrics, the log and the page."""

from __future__ import annotations

import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import fields
from html.parser import HTMLParser

import httpx
import pytest
from serving import Running, serving

from openm3.serve import ServeOptions

HELLO = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def strict(llm) -> Iterator[Running]:
    options = ServeOptions(api_keys=("first", "second"), max_body=20_000, body_seconds=0.5, max_prompt_tokens=200,
                           max_requests=2, log_content=True)  # fmt: skip
    with serving(lambda: llm, options) as server:
        yield server


def post(
    server: Running, body: object, path: str = "/v1/chat/completions", key: str = "first", **more
) -> httpx.Response:
    return httpx.post(server.url + path, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60, **more)


def test_only_a_key_lets_in(strict):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first"}, {"x-api-key": "Second"}):
        for path in ("/v1/chat/completions", "/v1/messages", "/v1/files"):
            answer = httpx.post(strict.url + path, json=HELLO, headers=headers)
            assert answer.status_code == 401
            assert "API key" in answer.json()["error"]["message"]
        assert httpx.get(strict.url + "/metrics", headers=headers).status_code == 401
    for headers in ({"Authorization": "bearer second"}, {"x-api-key": "first"}):
        assert httpx.post(strict.url + "/v1/chat/completions", json=HELLO, headers=headers).status_code == 200
    for path in ("/health", "/ready", "/"):
        assert httpx.get(strict.url + path).status_code == 200


def test_bodies_and_prompts_have_limits(strict):
    long = HELLO | {"messages": [{"role": "user", "content": "x" * 30_000}]}
    assert post(strict, long).status_code == 413
    assert post(strict, long, "/v1/messages").json()["error"]["type"] == "request_too_large"
    pieces = (b"x" * 1000 for _ in range(30))
    sent = httpx.post(strict.url + "/v1/chat/completions", content=pieces, headers={"x-api-key": "first"})
    assert sent.status_code == 413
    answer = post(strict, HELLO | {"messages": [{"role": "user", "content": "word " * 400}]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "at most 200" in answer.json()["error"]["message"]
    strict.idle()


def test_more_requests_than_allowed_are_told_to_wait(strict):
    answer = post(strict, HELLO | {"n": 3})
    assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
    assert answer.headers["retry-after"] == "1"


def test_a_body_that_does_not_arrive_is_given_up(strict):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nx-api-key: first\r\nContent-Length: 100\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", strict.port)) as half:
        half.sendall(head)
        half.settimeout(10)
        begun = time.monotonic()
        assert half.recv(4096).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - begun < 5


@pytest.mark.parametrize(("body", "said"), [
    (b"", "body"), (b"{", "not JSON"), (b"[]", "body"), (b"null", "body"), (b'"text"', "body"), (b"\xff", ""),
    (b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", ""), (b'{"messages": [NaN]}', ""),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 1}', None),
    (b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1e400}', "max_tokens"),
    (b'{"messages": [{"role": "user", "content": "a"}], "seed": 99999999999999999999999, "max_tokens": 1}', None),
    (b'{"messages": [{"role": "user", "content": "a"}], "tools": [{"function": {"name": "\\udfff"}}], "max_tokens": 1}',
     None),
    (b'{"messages": [{"role": "user", "content": "a"}], "logit_bias": {"x": 1}}', "logit_bias"),
])  # fmt: skip
def test_no_body_makes_the_server_fail(running, body, said):
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(running.url + "/v1/chat/completions", content=body, headers=headers, timeout=60)
    assert answer.status_code == (200 if said is None else 400)
    if said:
        assert said in answer.json()["error"]["message"]
    running.idle()


def test_ids_lead_from_answers_to_the_log(strict, caplog):
    with caplog.at_level(logging.INFO, "openm3.serve"):
        own = post(strict, HELLO)
        given = httpx.get(strict.url + "/health", headers={"x-request-id": "mine-1"})
        bad = httpx.get(strict.url + "/health", headers={"x-request-id": 'a b"c'})
        deadline = time.monotonic() + 5
        while len(lines := [json.loads(r.message) for r in caplog.records if r.name == "openm3.serve"]) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert given.headers["x-request-id"] == "mine-1"
    assert re.fullmatch("req_[0-9a-f]{32}", bad.headers["x-request-id"])
    [line] = [line for line in lines if line["request_id"] == own.headers["x-request-id"]]
    assert (line["path"], line["status"], line["completion_tokens"]) == ("/v1/chat/completions", 200, 4)
    assert "Hello!" in line["prompt"]
    assert line["answers"][0].endswith(own.json()["choices"][0]["message"]["content"])


def test_content_is_not_logged_unless_asked_for(running, caplog):
    with caplog.at_level(logging.DEBUG):
        httpx.post(running.url + "/v1/chat/completions", json=HELLO, timeout=60)
        running.idle()
    assert "Hello" not in caplog.text


def test_what_happens_is_counted(running):
    def values() -> dict[str, float]:
        lines = httpx.get(running.url + "/metrics").text.splitlines()
        return {name: float(value) for name, value in (li.rsplit(" ", 1) for li in lines if not li.startswith("#"))}

    before = values()
    answer = httpx.post(running.url + "/v1/chat/completions", json=HELLO, timeout=60).json()
    running.idle()
    after = values()
    route = 'openm3_http_requests_total{route="/v1/chat/completions",status="200"}'
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown[route] == 1
    assert grown["openm3_prompt_tokens_total"] == answer["usage"]["prompt_tokens"]
    assert grown["openm3_generated_tokens_total"] == answer["usage"]["completion_tokens"] == 4
    assert grown["openm3_time_to_first_token_seconds_count"] == 1
    assert grown["openm3_inter_token_seconds_count"] == 3
    assert grown['openm3_answers_total{reason="length"}'] == 1
    assert after["openm3_pages_free"] == after["openm3_pages"] > 0
    assert after["openm3_ready"] == 1
    assert after["openm3_requests_running"] == after["openm3_requests_waiting"] == 0


def test_the_page_needs_nothing_from_elsewhere(running):
    page = httpx.get(running.url + "/")
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    found: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            found.extend(value for name, value in attributes if name in ("src", "href") and value)

    Links().feed(page.text)
    assert found
    for link in found:
        assert httpx.get(f"{running.url}/{link}").status_code == 200, link
    for path in ("/nothing.js", "/..%2fapp.py", "/%2e%2e/app.py", "/app.py", "/v1/nothing"):
        answer = httpx.get(running.url + path)
        assert (answer.status_code, set(answer.json())) == (404, {"error"})


@pytest.mark.parametrize(("path", "allowed"), [("/v1/files", "GET, POST"), ("/v1/files/file-1", "DELETE, GET"),
                                               ("/v1/models/a/b", "GET"), ("/v1/messages", "POST")])  # fmt: skip
def test_a_method_that_is_not_there_is_told_which_are(running, path, allowed):
    answer = httpx.put(running.url + path)
    assert (answer.status_code, answer.headers["Allow"]) == (405, allowed)
    assert "PUT is not possible" in answer.text


def test_the_openapi_document_names_every_api(running):
    paths = httpx.get(running.url + "/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
            "/v1/files", "/v1/models", "/health", "/ready", "/metrics"} <= set(paths)  # fmt: skip


def test_the_openapi_document_has_an_example_of_every_body_that_is_answered(running):
    document = httpx.get(running.url + "/openapi.json").json()
    found = 0
    for path, operations in document["paths"].items():
        content = operations.get("post", {}).get("requestBody", {}).get("content", {})
        if "application/json" in content:
            name = content["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
            [example] = document["components"]["schemas"][name]["examples"]
            assert example["model"] == "openm3-nano"
            assert httpx.post(running.url + path, json=example, timeout=60).status_code == 200
            found += 1
    assert found == 5
    running.idle()


@pytest.mark.parametrize("name", [field.name for field in fields(ServeOptions) if field.type in ("int", "float")])
def test_a_limit_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} = -1"):
        ServeOptions(**{name: -1})
