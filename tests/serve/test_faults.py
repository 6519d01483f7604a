"""What goes wrong around a server: after each, the next request is answered and every page is back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import torch
from serving import Running

LONG = {"messages": [{"role": "user", "content": "Tell me about yourself."}], "max_tokens": 1500, "temperature": 5,
        "top_p": 1, "top_k": 0, "stream": True}  # fmt: skip
SHORT = {"messages": [{"role": "user", "content": "What is 12 + 30?"}], "max_tokens": 40, "temperature": 0}
PATH = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def _healthy(running: Running) -> Iterator[None]:
    yield
    running.idle()
    answer = httpx.post(running.url + PATH, json=SHORT, timeout=60)
    assert answer.json()["choices"][0]["message"]["content"] == "42"


def connect(running: Running, body: dict) -> socket.socket:
    data = json.dumps(body).encode()
    client = socket.create_connection(("127.0.0.1", running.port), timeout=30)
    client.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                   % (PATH.encode(), len(data), data))  # fmt: skip
    return client


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def cancelled(running: Running) -> float:
    text = httpx.get(running.url + "/metrics").text
    lines = [line for line in text.splitlines() if line.startswith('openm3_answers_total{reason="cancelled"}')]
    return float(lines[0].split()[-1]) if lines else 0.0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_ends_its_answer(running, stream):
    before = cancelled(running)
    client = connect(running, LONG | {"stream": stream})
    until(lambda: running.server.service.stats().running == 1)
    if stream:
        assert client.recv(1)
    client.close()
    running.idle(10)
    assert cancelled(running) == before + 1


def test_a_storm_of_cancels_at_every_stage(running):
    for delay in (0, 0, 0.002, 0.01, 0.03, 0.1):
        clients = [connect(running, LONG) for _ in range(8)]
        time.sleep(delay)
        for client in clients:
            client.close()
    running.idle(30)


def test_half_sent_requests_hold_up_nobody(running):
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" % PATH.encode()
    halves = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(20)]
    for i, half in enumerate(halves):
        half.sendall(head[: 30 + i] if i % 2 else head + b'{"messages"')
    answer = httpx.post(running.url + PATH, json=SHORT, timeout=60)
    assert answer.status_code == 200
    for half in halves:
        half.close()


def test_a_reader_that_is_slow_gets_everything_and_holds_up_nobody(running):
    slow = connect(running, LONG | {"max_tokens": 100, "seed": 3})
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    assert httpx.post(running.url + PATH, json=SHORT, timeout=60).status_code == 200
    received = b""
    while not received.endswith(b"0\r\n\r\n"):
        piece = slow.recv(2000)
        assert piece
        received += piece
        time.sleep(0.005)
    slow.close()
    assert b"data: [DONE]" in received


def test_an_exception_in_a_step_fails_its_request_only(running, llm, monkeypatch):
    healthy, poison = llm.engine.runner.run, "xyzzy"
    marked = llm.processor.tokenizer.encode(poison)

    def failing(batch):
        for chunk in batch.chunks:
            ids = chunk.request.prompt_ids
            if any(ids[i : i + len(marked)] == marked for i in range(len(ids))):
                raise RuntimeError("secret detail")
        return healthy(batch)

    monkeypatch.setattr(llm.engine.runner, "run", failing)
    bad = SHORT | {"messages": [{"role": "user", "content": poison}]}
    answers: dict[str, httpx.Response] = {}

    def ask(name: str, body: dict) -> None:
        answers[name] = httpx.post(running.url + PATH, json=body, timeout=60)

    threads = [threading.Thread(target=ask, args=pair) for pair in (("bad", bad), ("streamed", bad | {"stream": True}))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    error = answers["bad"].json()["error"]
    assert (answers["bad"].status_code, error["type"]) == (500, "server_error")
    assert "RuntimeError" in error["message"]
    events = [line for line in answers["streamed"].text.splitlines() if line.startswith("data: {")]
    assert json.loads(events[-1][6:])["error"]["type"] == "server_error"
    for answer in answers.values():
        assert "secret" not in answer.text
        assert "Traceback" not in answer.text


def test_a_step_that_runs_out_of_memory_is_computed_in_parts(running, llm, monkeypatch):
    healthy, refused = llm.engine.runner.run, []

    def small_only(batch):
        if batch.tokens > 40:
            refused.append(batch.tokens)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return healthy(batch)

    monkeypatch.setattr(llm.engine.runner, "run", small_only)
    body = SHORT | {"messages": [{"role": "user", "content": "Words that no request before this one had. " * 8}]}
    answer = httpx.post(running.url + PATH, json=body | {"max_tokens": 3}, timeout=60)
    monkeypatch.undo()
    assert refused
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 3


class Process:
    """`openm3 serve` as it is run, in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "openm3.cli", "serve", "--port", str(self.port), *arguments]
        self.process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE,
                                        text=True)  # fmt: skip
        self.url = f"http://127.0.0.1:{self.port}"

    def ready(self) -> int:
        try:
            return httpx.get(self.url + "/ready").status_code
        except httpx.TransportError:
            return 0


def test_sigterm_lets_answers_finish_and_takes_no_new_ones():
    server = Process("--cache-tokens", "20000")
    try:
        until(lambda: server.ready() == 200, 60)
        lines: list[str] = []
        first = threading.Event()

        def read() -> None:
            body = LONG | {"max_tokens": 50, "seed": 1}
            with httpx.stream("POST", server.url + PATH, json=body, timeout=60) as answer:
                for line in answer.iter_lines():
                    lines.append(line)
                    first.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert first.wait(30)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.ready() == 503, 5)
        refused = httpx.post(server.url + PATH, json=SHORT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert httpx.get(server.url + "/health").status_code == 200
        reader.join(60)
        assert "data: [DONE]" in lines
        assert server.process.wait(20) == 0
        log = server.process.stderr.read()
        assert '"draining": true' in log
        assert "Traceback" not in log
    finally:
        server.process.kill()
        server.process.wait()
        server.process.stderr.close()


def test_a_model_that_does_not_fit_is_refused_with_its_plan(tmp_path):
    from openm3.config import M3Config

    M3Config.preset("m3").save_pretrained(tmp_path)
    run = subprocess.run([sys.executable, "-m", "openm3.cli", "serve", str(tmp_path), "--device", "cpu"],
                         capture_output=True, text=True, timeout=60)  # fmt: skip
    assert run.returncode == 2
    assert "does not fit cpu" in run.stderr.splitlines()[-1]
    assert "active a token" in run.stderr
