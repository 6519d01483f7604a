"""What goes wrong, in the shape of the API that was asked: Anthropic's under /v1/messages, OpenAI's everywhere else."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from openm3.engine.request import TooLongError
from openm3.engine.service import Busy, StepFailed, Unavailable

ANTHROPIC_PATH = "/v1/messages"
# status: (OpenAI's type, Anthropic's type)
TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("invalid_request_error", "authentication_error"),
    404: ("invalid_request_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("invalid_request_error", "invalid_request_error"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "invalid_request_error"),
    429: ("rate_limit_error", "rate_limit_error"),
    500: ("server_error", "api_error"),
    503: ("server_error", "overloaded_error"),
}
INTERNAL = "the server failed at this request; its log says more under the request's id"


def _documented(error: dict[str, Any], **beside: Any) -> dict[int | str, dict[str, Any]]:
    """Errors of a shape as the OpenAPI document has them."""
    properties = {name: {"type": kind} for name, kind in error.items()}
    inner = {"type": "object", "properties": properties, "required": [*properties]}
    schema = {"type": "object", "properties": {"error": inner} | beside, "required": ["error"]}
    content = {"application/json": {"schema": schema}}
    return {"4XX": {"description": "A request that cannot be answered", "content": content},
            "5XX": {"description": "The server cannot answer", "content": content}}  # fmt: skip


OPENAI_ERRORS = _documented({"message": "string", "type": "string", "param": ["string", "null"],
                             "code": ["string", "null"]})  # fmt: skip
ANTHROPIC_ERRORS = _documented({"message": "string", "type": "string"}, type={"const": "error"},
                               request_id={"type": ["string", "null"]})  # fmt: skip
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {}}}, "description": "Whole, or as a stream"}
}


class ApiError(Exception):
    """An answer that is an error. param: the field it is about; code: OpenAI's word for it, where there is one."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def api_error(error: Exception) -> ApiError:
    """Any error as the one to answer with. What is not the caller's doing says nothing of its inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Unavailable):
        return ApiError(503, str(error), code="unavailable")
    if isinstance(error, Busy):
        return ApiError(429, str(error), code="rate_limit_exceeded")
    if isinstance(error, StepFailed):
        return ApiError(500, str(error))
    if isinstance(error, TooLongError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, ValueError):  # of the processor and the engine: one line, with the place and the value
        return ApiError(400, str(error))
    return ApiError(500, INTERNAL)


def error_body(error: ApiError, path: str, request_id: str | None = None) -> dict[str, Any]:
    """The error's JSON in the shape of the path's API."""
    openai, anthropic = TYPES.get(error.status, TYPES[500 if error.status >= 500 else 400])
    if path.startswith(ANTHROPIC_PATH):
        return {"type": "error", "error": {"type": anthropic, "message": error.message}, "request_id": request_id}
    return {"error": {"message": error.message, "type": openai, "param": error.param, "code": error.code}}


def error_response(error: ApiError, path: str, request_id: str | None = None) -> Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(error_body(error, path, request_id), error.status, headers)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dump(value), status, headers, "application/json")


def dump(value: Any) -> bytes:
    """Compact JSON; characters that UTF-8 has no form for become `?`."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", errors="replace")
