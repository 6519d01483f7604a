"""OpenAI's /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from openm3.engine import Finish
from openm3.engine.service import Stream
from openm3.processing import ContentDelta, ThinkingDelta, ToolCall
from openm3.serve.errors import OPENAI_ERRORS, STREAMED, ApiError, error_body, json_response
from openm3.serve.generation import (
    EFFORTS,
    Answer,
    EventStream,
    Sampling,
    Server,
    StreamOptions,
    Thinking,
    arguments_json,
    gathered,
    merged,
    new_id,
    sse,
    submitted,
    thinking_mode,
    told,
)
from openm3.serve.grammars import StructuredOutputs, response_grammar, structured_grammar, tool_grammar
from openm3.serve.schemas import HELLO, Format, Messages, TemplateOptions, ToolChoice, Tools, example

PATH = "/v1/chat/completions"
MIN_LOGPROB = -9999.0  # JSON has no infinity


class ChatBody(Sampling):
    """The fields from `store` on are taken and have no effect here."""

    model_config = example(messages=HELLO, max_completion_tokens=16)

    messages: Messages
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = told(minimum=1)
    max_completion_tokens: int | None = told(minimum=1)
    n: int = Field(1, json_schema_extra={"minimum": 1})
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    response_format: Format | None = None
    structured_outputs: StructuredOutputs | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateOptions | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = told(enum=[*EFFORTS, None])
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    verbosity: str | None = None
    modalities: list[Literal["text"]] | None = None


def router(server: Server) -> APIRouter:
    routes = APIRouter(tags=["openai"], responses=OPENAI_ERRORS)

    @routes.post(PATH, responses=STREAMED)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answers a conversation, whole or as a stream of chunks."""
        server.check_model(body.model)
        if not 1 <= body.n <= server.options.max_choices:
            raise ApiError(400, f"n = {body.n}: must be from 1 to {server.options.max_choices}", param="n")
        streams = await submitted(request, server, _submit(server, body))
        head = {"id": new_id("chatcmpl-"), "created": int(time.time()), "model": body.model or server.names[0]}
        if body.stream:
            return EventStream(request, streams, _chunks(server, head, streams, body),
                               lambda error: sse(error_body(error, PATH)))  # fmt: skip
        answers = await gathered(request, streams)
        choices = [
            {"index": i, "message": message(answer), "finish_reason": answer.finish_reason,
             "logprobs": _logprobs(stream, 0, server)[0] if body.logprobs else None}
            for i, (answer, stream) in enumerate(zip(answers, streams))
        ]  # fmt: skip
        return json_response(head | {"object": "chat.completion", "choices": choices, "usage": usage(streams)})

    return routes


async def _submit(server: Server, body: ChatBody) -> list[Stream]:
    mode = thinking_mode(body.thinking, body.chat_template_kwargs, body.enable_thinking, body.reasoning_effort)
    tools, grammar = tool_grammar(body.tool_choice, body.tools, body.parallel_tool_calls)
    shape = response_grammar(body.response_format) or structured_grammar(body.structured_outputs)
    if shape is not None and tools:
        raise ApiError(400, "response_format and tools: one answer is held to one of them", param="response_format")
    messages, options = await server.media.resolve(body.messages)
    params = body.params(
        n=body.n,
        max_tokens=body.max_completion_tokens if body.max_tokens is None else body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        thinking_budget=body.thinking.budget_tokens if body.thinking else None,
    )
    return await server.service.chat(messages, params, tools=tools, thinking=mode, grammar=shape or grammar,
                                     priority=body.priority, **options)  # fmt: skip


def message(answer: Answer) -> dict[str, Any]:
    out: dict[str, Any] = {"role": "assistant", "content": answer.content or (None if answer.calls else "")}
    if answer.reasoning:
        out["reasoning_content"] = answer.reasoning
    if answer.calls:
        out["tool_calls"] = [_call(call) for call in answer.calls]
    return out


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": arguments_json(call)}
    return {"id": new_id("call_"), "type": "function", "function": function}


def usage(streams: list[Stream]) -> dict[str, Any]:
    prompt, cached, _, _ = streams[0].usage
    completion = sum(stream.usage[2] for stream in streams)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": sum(stream.usage[3] for stream in streams)},
    }


def _logprobs(stream: Stream, start: int, server: Server) -> tuple[dict[str, Any], int]:
    """(OpenAI's logprobs of the tokens from `start` on that are neither thinking nor markers, where they end)."""
    start = max(start, stream.reasoning_tokens)
    records, tokenizer = stream.request.logprobs[start:], server.service.llm.processor.tokenizer
    markers = stream.request.eos_ids | set(tokenizer.specials.values())

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        return {"token": raw.decode(errors="replace"), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(raw)}

    content = [entry(r.token, r.logprob) | {"top_logprobs": [entry(*top) for top in r.top]}
               for r in records if r.token not in markers]  # fmt: skip
    return {"content": content, "refusal": None}, start + len(records)


async def _chunks(server: Server, head: dict[str, Any], streams: list[Stream], body: ChatBody) -> AsyncIterator[bytes]:
    head = head | {"object": "chat.completion.chunk"}
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    sent = [0] * len(streams)  # tokens whose logprobs are out

    def chunk(i: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> bytes:
        choice = {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return sse(head | {"choices": [choice]} | ({"usage": None} if with_usage else {}))

    for i in range(len(streams)):
        yield chunk(i, {"role": "assistant", "content": ""})
    async for i, event in merged(streams):
        logprobs = None
        if body.logprobs and isinstance(event, ContentDelta | Finish):
            logprobs, sent[i] = _logprobs(streams[i], sent[i], server)
        if isinstance(event, ThinkingDelta):
            yield chunk(i, {"reasoning_content": event.text})
        elif isinstance(event, ContentDelta):
            yield chunk(i, {"content": event.text}, logprobs=logprobs)
        elif isinstance(event, ToolCall):
            yield chunk(i, {"tool_calls": [{"index": event.index} | _call(event)]})
        else:
            yield chunk(i, {}, event.finish_reason, logprobs)
    if with_usage:
        yield sse(head | {"choices": [], "usage": usage(streams)})
    yield b"data: [DONE]\n\n"
