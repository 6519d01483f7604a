"""What the APIs share: thinking modes and sampling as the engine takes them, answers gathered whole or streamed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import StreamingResponse

from openm3.engine import Finish, SamplingParams
from openm3.engine.request import TooLongError
from openm3.engine.service import Event, Service, Stream
from openm3.processing import ContentDelta, ThinkingDelta, ToolCall
from openm3.serve.errors import INTERNAL, ApiError, api_error, dump
from openm3.serve.files import FileStore
from openm3.serve.media import MediaSource
from openm3.serve.options import ServeOptions

T = TypeVar("T")
log = logging.getLogger("openm3.serve")

EFFORTS = {"none": "disabled", "minimal": "disabled", "low": "adaptive", "medium": "adaptive", "high": "enabled",
           "xhigh": "enabled", "max": "enabled"}  # fmt: skip
MODES = ("enabled", "adaptive", "disabled")


@dataclass(frozen=True)
class Server:
    """What every API works with. names: the model's, the first one is told."""

    service: Service
    options: ServeOptions
    names: tuple[str, ...]
    files: FileStore
    media: MediaSource
    created: int

    def check_model(self, name: str | None) -> None:
        """ApiError (404) for a model that is not served; None is the one there is."""
        if name is not None and name not in self.names:
            raise ApiError(404, f"the model {name[:100]!r} does not exist; this server has {', '.join(self.names)}",
                           param="model", code="model_not_found")  # fmt: skip


def told(**bounds: Any) -> Any:
    """A field that may be left out, with bounds for the OpenAPI document: the engine checks them and says so better."""
    return Field(None, json_schema_extra=bounds)


class Body(BaseModel):
    """A request's JSON. A field that the API does not have is refused by name, so that a misspelt one is noticed."""

    model_config = ConfigDict(extra="forbid")


class Loose(BaseModel):
    """A part of a request whose other fields say nothing to the model (`cache_control`, `annotations`) and are kept."""

    model_config = ConfigDict(extra="allow")


class StreamOptions(Loose):
    include_usage: bool = False


class Thinking(Body):
    """Whether the model thinks first; budget_tokens: after so many tokens of thinking it has to answer."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = told(minimum=0)
    display: str | None = None


class Sampling(Body):
    """How tokens are chosen, as OpenAI's APIs and other servers of open models spell it."""

    temperature: float | None = told(minimum=0, maximum=100)
    top_p: float | None = told(exclusiveMinimum=0, maximum=1)
    top_k: int | None = told(minimum=-1)
    min_p: float | None = told(minimum=0, maximum=1)
    seed: int | None = None
    stop: str | list[str] | None = told(minLength=1)
    stop_token_ids: list[int] | None = None
    repetition_penalty: float | None = told(minimum=0.01, maximum=100)
    presence_penalty: float | None = told(minimum=-2, maximum=2)
    frequency_penalty: float | None = told(minimum=-2, maximum=2)
    logit_bias: dict[int, float] | None = None
    priority: int = 0

    def params(self, **more: Any) -> SamplingParams:
        """Raises RequestError for a value out of range."""
        names = ("temperature", "top_p", "min_p", "seed", "stop", "stop_token_ids", "repetition_penalty",
                 "presence_penalty", "frequency_penalty", "logit_bias")  # fmt: skip
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.top_k is not None:
            given["top_k"] = max(self.top_k, 0)  # -1 is off too
        return SamplingParams(**given, **{name: value for name, value in more.items() if value is not None})


def thinking_mode(
    thinking: Thinking | None = None,
    template: dict[str, Any] | None = None,
    enable_thinking: bool | None = None,
    effort: str | None = None,
) -> str:
    """The mode that a request asks for, adaptive where it says nothing. The first of these that is given decides:
    `thinking.type`, `chat_template_kwargs` (thinking_mode, enable_thinking, thinking), enable_thinking, effort."""
    template = template or {}
    if unknown := set(template) - {"thinking_mode", "enable_thinking", "thinking"}:
        raise ApiError(400, f"chat_template_kwargs: unknown name {min(unknown)[:60]!r}", param="chat_template_kwargs")
    switches = [template.get("thinking_mode"), template.get("enable_thinking"), template.get("thinking")]
    for value in (thinking.type if thinking else None, *switches, enable_thinking):
        if isinstance(value, bool):
            return "enabled" if value else "disabled"
        if value is not None:
            if value not in MODES:
                raise ApiError(400, f"thinking mode {str(value)[:60]!r}: must be one of {', '.join(MODES)}",
                               param="thinking")  # fmt: skip
            return value
    if effort is None:
        return "adaptive"
    if effort not in EFFORTS:
        raise ApiError(400, f"reasoning_effort {effort[:60]!r}: must be one of {', '.join(EFFORTS)}",
                       param="reasoning_effort")  # fmt: skip
    return EFFORTS[effort]


# --- answers ------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """One answer, whole."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str = ""

    def take(self, event: Event) -> None:
        if isinstance(event, ThinkingDelta):
            self.reasoning += event.text
        elif isinstance(event, ContentDelta):
            self.content += event.text
        elif isinstance(event, ToolCall):
            self.calls.append(event)
        else:
            self.finish_reason = event.finish_reason


async def attended(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives; it is cancelled if the client goes away before (ApiError 499, which nobody will read)."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has gone")
        return task.result()
    finally:
        for future in (task, gone):
            future.cancel()
        with contextlib.suppress(BaseException):
            await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def submitted(request: Request, server: Server, work: Awaitable[list[Stream]]) -> list[Stream]:
    """The streams that `work` submits, which are cancelled again should one not fit the server's limits."""
    streams = await attended(request, work)
    limit = server.options.max_prompt_tokens
    longest = max(len(stream.request.prompt_ids) for stream in streams)
    if limit is not None and longest > limit:
        cancel(streams)
        raise TooLongError(f"the prompt has {longest} tokens, this server takes at most {limit}")
    return streams


async def gathered(request: Request, streams: list[Stream]) -> list[Answer]:
    """All answers to their end; the streams are cancelled if the client goes away or one of them fails."""

    async def one(stream: Stream) -> Answer:
        answer = Answer()
        async for event in stream:
            answer.take(event)
        if answer.finish_reason in ("cancelled", "deadline"):
            raise ApiError(503, "the answer was cut off: the server is shutting down or out of time")
        return answer

    try:
        return list(await attended(request, asyncio.gather(*map(one, streams))))
    finally:
        note(request, streams)
        cancel(streams)


async def merged(streams: list[Stream]) -> AsyncIterator[tuple[int, Event]]:
    """(which stream, event) of all streams as they come."""
    if len(streams) == 1:
        async for event in streams[0]:
            yield 0, event
        return
    waiting = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i, event = waiting.pop(task), task.result()
                yield i, event
                if not isinstance(event, Finish):
                    waiting[asyncio.ensure_future(anext(streams[i]))] = i
    finally:
        for task in waiting:
            task.cancel()


class EventStream(StreamingResponse):
    """Server-sent events. However it ends, its streams have ended then; an error on the way becomes the last event."""

    def __init__(self, request: Request, streams: list[Stream], pieces: AsyncIterator[bytes],
                 on_error: Callable[[ApiError], bytes]) -> None:  # fmt: skip
        super().__init__(self._guarded(pieces, on_error), media_type="text/event-stream",
                         headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})  # fmt: skip
        self._request, self._streams = request, streams

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            note(self._request, self._streams)
            cancel(self._streams)

    async def _guarded(self, pieces: AsyncIterator[bytes], on_error: Callable[[ApiError], bytes]) -> Any:
        try:
            async for piece in pieces:
                yield piece
        except Exception as error:
            answer = api_error(error)
            if answer.message == INTERNAL:
                log.exception("request %s failed", self._request.state.request_id)
            yield on_error(answer)


def cancel(streams: Iterable[Stream]) -> None:
    for stream in streams:
        stream.cancel()


def note(request: Request, streams: list[Stream]) -> None:
    """Leaves the request's counts for its line in the log."""
    usages = [stream.usage for stream in streams]
    request.state.log = {
        "prompt_tokens": usages[0][0],
        "cached_tokens": usages[0][1],
        "completion_tokens": sum(usage[2] for usage in usages),
        "finish_reason": streams[0].request.finish_reason,
    }
    server: Server = request.app.state.server
    if server.options.log_content:
        decode = server.service.llm.processor.tokenizer.decode
        request.state.log |= {
            "prompt": decode(streams[0].request.prompt_ids),
            "answers": [decode(stream.request.output_ids) for stream in streams],
        }


def sse(value: Any, event: str | None = None) -> bytes:
    """One server-sent event."""
    head = f"event: {event}\n".encode() if event else b""
    return head + b"data: " + dump(value) + b"\n\n"


def arguments_json(call: ToolCall) -> str:
    return json.dumps(call.arguments, ensure_ascii=False)


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex[:24]}"
