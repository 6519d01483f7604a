"""What every request passes first: an id, the API key, limits on connections and bodies; and one line in the log.

Plain ASGI, so that streams pass untouched. A body is read here, whole, within its size and time, before anything of
the request is looked at: a half-sent one costs a slot for some seconds and nothing else.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from typing import TYPE_CHECKING, Any

from openm3.serve.errors import ANTHROPIC_PATH, ApiError, api_error, error_response

if TYPE_CHECKING:
    from openm3.serve.metrics import Metrics
    from openm3.serve.options import ServeOptions

log = logging.getLogger("openm3.serve")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
OPEN = ("/health", "/ready")  # asked without a key; the page and its files too, they hold nothing


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: Any, options: ServeOptions, metrics: Metrics) -> None:
        self.app, self.options, self.metrics = app, options, metrics
        self._keys = [key.encode() for key in options.api_keys]
        self._open = 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        given = headers.get("x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        path, begun = scope["path"], time.monotonic()
        scope.setdefault("state", {})["request_id"] = request_id
        outcome = {"status": 0}

        async def sending(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                outcome["status"] = message["status"]
                name = b"request-id" if path.startswith(ANTHROPIC_PATH) else b"x-request-id"
                message = message | {"headers": [*message["headers"], (name, request_id.encode())]}
            async with asyncio.timeout(self.options.write_seconds):
                await send(message)

        self._open += 1
        try:
            try:
                self._check(path, headers)
                receive = await self._with_body(headers, receive)
                await self.app(scope, receive, sending)
            except Exception as error:
                answer = api_error(error)
                if answer.status == 500 and not isinstance(error, _Gone | TimeoutError | OSError):
                    log.exception("request %s failed", request_id)
                if outcome["status"] == 0 and not isinstance(error, _Gone):
                    await error_response(answer, path, request_id)(scope, receive, sending)
        finally:
            self._open -= 1
            seconds = time.monotonic() - begun
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.answered(route, outcome["status"], seconds)
            line = {"request_id": request_id, "method": scope["method"], "path": path, "status": outcome["status"],
                    "seconds": round(seconds, 4)} | scope["state"].get("log", {})  # fmt: skip
            log.info(json.dumps(line, ensure_ascii=False))

    def _check(self, path: str, headers: dict[str, bytes]) -> None:
        if self._open > self.options.max_connections and path not in OPEN:
            raise ApiError(429, f"over {self.options.max_connections} requests are open; try again later",
                           code="rate_limit_exceeded")  # fmt: skip
        if not self._keys or not (path.startswith("/v1/") or path == "/metrics"):
            return
        scheme, _, token = headers.get("authorization", b"").partition(b" ")
        given = [headers.get("x-api-key", b""), token.strip() if scheme.lower() == b"bearer" else b""]
        if not any(hmac.compare_digest(key, value) for key in self._keys for value in given):
            raise ApiError(401, "the API key is missing or wrong: send Authorization: Bearer KEY, or x-api-key: KEY",
                           code="invalid_api_key")  # fmt: skip

    async def _with_body(self, headers: dict[str, bytes], receive: Any) -> Any:
        """The request's `receive`, its body read already."""
        limit = self.options.max_body
        too_large = ApiError(413, f"the body has more than {limit:,} bytes, the most this server takes")
        length = headers.get("content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > limit:
            raise too_large
        pieces, size = [], 0
        try:
            async with asyncio.timeout(self.options.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
                    if size > limit:
                        raise too_large
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {self.options.body_seconds:g} seconds", code="timeout"
            ) from None
        body = [b"".join(pieces)]

        async def replay() -> dict[str, Any]:
            if body:
                return {"type": "http.request", "body": body.pop(), "more_body": False}
            return await receive()

        return replay


class _Gone(Exception):
    """The client went away before its request was whole."""
