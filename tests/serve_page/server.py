"""The page and the part of the API that it uses, over HTTP, with any Python function as the model.

An answer is an iterator of deltas in the shape of `choices[0].delta`, and of the exceptions below, which say what else
a server may do. It runs on the request's thread and is closed when the reader goes away.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from typing import Any

from openm3.serve.app import PAGE, PAGE_HEADERS, PAGE_TYPES

Answer = Callable[[dict[str, Any]], Iterable[dict[str, Any] | Exception]]


@dataclass
class Refused(Exception):
    """Instead of an answer: a status and a message. In the middle of one: an error event."""

    status: int
    message: str


class Broken(Exception):
    """The connection ends here, without a word."""


class PageServer(ThreadingHTTPServer):
    """Serves on a free port of 127.0.0.1 until `stop`. `requests` keeps the bodies of the chats asked for."""

    daemon_threads = True

    def __init__(self, answer: Answer, models: tuple[str, ...] = ("openm3-nano",)) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.models = answer, models
        self.key: str | None = None
        self.requests: list[dict[str, Any]] = []
        self.left = threading.Event()  # a reader has gone before its answer ended
        self.url = f"http://127.0.0.1:{self.server_port}/"
        threading.Thread(target=partial(self.serve_forever, poll_interval=0.05), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a page that is closed hangs up on its files
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: PageServer

    def log_message(self, *_: Any) -> None:
        return

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/v1/models":
            if not self._refused():
                self._json(200, {"object": "list", "data": [{"id": m, "object": "model"} for m in self.server.models]})
            return
        file = PAGE / (path.lstrip("/") or "index.html")
        if file.parent != PAGE or not file.exists():
            self._json(404, {"error": {"message": "not found"}})
            return
        self._head(200, PAGE_TYPES[file.suffix])
        self.wfile.write(file.read_bytes())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        self.server.requests.append(body)
        pieces = _chain(self.server.answer(body))
        try:
            first = next(pieces)
            if isinstance(first, Refused):
                self._json(first.status, {"error": {"message": first.message}})
                return
            self._head(200, "text/event-stream")
            self._stream(first, pieces)
        except (BrokenPipeError, ConnectionResetError):
            self.server.left.set()
        finally:
            pieces.close()

    def _refused(self) -> bool:
        key = self.server.key
        if key is None or self.headers["Authorization"] == f"Bearer {key}":
            return False
        self._json(401, {"error": {"message": "no such key"}})
        return True

    def _stream(self, first: Any, rest: Iterator[Any]) -> None:
        reason, usage = "stop", None
        for piece in chain((first,), rest):
            if isinstance(piece, Broken):
                return
            if isinstance(piece, Refused):
                self._event({"error": {"message": piece.message, "code": piece.status}})
                return
            if "finish_reason" in piece:
                reason, usage = piece["finish_reason"], piece.get("usage")
                continue
            self._event(self._chunk([{"index": 0, "delta": piece, "finish_reason": None}]))
        self._event(self._chunk([{"index": 0, "delta": {}, "finish_reason": reason}]))
        if usage:
            self._event(self._chunk([], usage=usage))
        self.wfile.write(b"data: [DONE]\n\n")

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {"id": "chat", "object": "chat.completion.chunk", "model": self.server.models[0], "choices": choices,
                **more}  # fmt: skip

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()

    def _head(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for header in PAGE_HEADERS.items():
            self.send_header(*header)
        self.end_headers()

    def _json(self, status: int, value: dict[str, Any]) -> None:
        self._head(status, "application/json")
        self.wfile.write(json.dumps(value).encode())


def _chain(pieces: Iterable[Any]) -> Iterator[Any]:
    """A generator of anything that gives pieces: it can be closed."""
    yield from pieces
