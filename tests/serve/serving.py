"""A server in this process, on a port of its own, and the pictures that tests show it."""

from __future__ import annotations

import base64
import json
import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from openm3.engine import LLM
from openm3.serve import ServeOptions, create_app

EXAMPLES = Path(__file__).parents[2] / "examples"
SOAK = Path(__file__).parents[2] / "benchmarks" / "results" / "serve_soak.json"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
            "required": ["city"],
        },
    },
}
ASK_WEATHER = "Get the weather with city Paris, unit celsius. What is the temperature?"
PARIS = {"city": "Paris", "unit": "celsius"}
RESULT = '{"city": "Paris", "temperature": 21}'


def record(test: str, **figures: Any) -> None:
    """Prints what a long check found and keeps it beside the benchmarks' results."""
    print(test, figures)
    known = json.loads(SOAK.read_text()) if SOAK.exists() else {}
    known[test] = figures | {"machine": f"{platform.machine()} CPU, {os.cpu_count()} cores"}
    SOAK.write_text(json.dumps(known, indent=1) + "\n")


def data_url(name: str, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode((EXAMPLES / name).read_bytes()).decode()}"


class Running:
    """A server that answers: its address, its application, and what is free in it."""

    def __init__(self, app: Any, port: int) -> None:
        self.app, self.port, self.url = app, port, f"http://127.0.0.1:{port}"
        self.server = app.state.server

    def idle(self, seconds: float = 20.0) -> None:
        """Waits until nothing is under way; every page must be back then."""
        service, end = self.server.service, time.monotonic() + seconds
        while service.under_way or service.stats().running:
            assert time.monotonic() < end, (service.under_way, service.stats())
            time.sleep(0.01)
        stats = service.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert stats.pages_free == stats.pages


@contextmanager
def serving(load: Callable[[], LLM], options: ServeOptions | None = None, **more: Any) -> Iterator[Running]:
    """Serves a model until the block ends."""
    app = create_app(load, ("openm3-nano", "alias"), options, **more)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(256)
        server = uvicorn.Server(uvicorn.Config(app, http="h11", log_config=None, access_log=False,
                                               timeout_graceful_shutdown=2))  # fmt: skip
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            end = time.monotonic() + 60
            while not server.started:
                assert thread.is_alive()
                assert time.monotonic() < end
                time.sleep(0.01)
            app.state.server.service.wait(60)
            yield Running(app, listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
