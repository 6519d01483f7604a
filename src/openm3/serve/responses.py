"""OpenAI's /v1/responses: text, pictures, tools and reasoning items, whole or streamed.

Nothing is kept between requests, so a conversation is sent whole each time.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from openm3.engine import Finish
from openm3.engine.service import Stream
from openm3.processing import ContentDelta, ThinkingDelta, ToolCall
from openm3.serve.errors import OPENAI_ERRORS, STREAMED, ApiError, error_body, json_response
from openm3.serve.generation import (
    EFFORTS,
    Answer,
    EventStream,
    Loose,
    Sampling,
    Server,
    Thinking,
    arguments_json,
    gathered,
    new_id,
    sse,
    submitted,
    thinking_mode,
    told,
)
from openm3.serve.grammars import response_grammar, tool_grammar
from openm3.serve.schemas import FlatFormat, FlatToolChoice, FlatTools, Items, TemplateOptions, example

PATH = "/v1/responses"
TEXTS = ("input_text", "output_text", "text")


class Reasoning(Loose):
    effort: str | None = told(enum=[*EFFORTS, None])


class TextOptions(Loose):
    format: FlatFormat | None = None


class ResponsesBody(Sampling):
    """The fields from `include` on are taken and have no effect here."""

    model_config = example(input="Hello!", max_output_tokens=16)

    input: str | Items
    model: str | None = None
    instructions: str | None = None
    stream: bool = False
    max_output_tokens: int | None = told(minimum=1)
    tools: FlatTools | None = None
    tool_choice: FlatToolChoice | None = None
    parallel_tool_calls: bool = True
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateOptions | None = None
    enable_thinking: bool | None = None
    previous_response_id: None = None
    conversation: None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    stream_options: dict[str, Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None


def router(server: Server) -> APIRouter:
    routes = APIRouter(tags=["openai"], responses=OPENAI_ERRORS)

    @routes.post(PATH, responses=STREAMED)
    async def responses(body: ResponsesBody, request: Request) -> Response:
        """Answers a conversation given as items, with items."""
        server.check_model(body.model)
        [stream] = await submitted(request, server, _submit(server, body))
        head = _head(server, body, stream)
        if body.stream:
            return EventStream(request, [stream], _Events(head, stream).pieces(), _failed)
        [answer] = await gathered(request, [stream])
        return json_response(head | {"output": _items(answer)} | _ending(stream, answer.finish_reason))

    return routes


def _failed(error: ApiError) -> bytes:
    about = error_body(error, PATH)["error"]
    return sse({"type": "error", "sequence_number": 0} | {name: about[name] for name in ("message", "code", "param")},
               "error")  # fmt: skip


async def _submit(server: Server, body: ResponsesBody) -> list[Stream]:
    effort = body.reasoning.effort if body.reasoning else None
    mode = thinking_mode(body.thinking, body.chat_template_kwargs, body.enable_thinking, effort)
    choice = body.tool_choice
    if isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    offered = [_tool(tool, i) for i, tool in enumerate(body.tools or ())] or None
    tools, grammar = tool_grammar(choice, offered, body.parallel_tool_calls)
    if body.text is not None and body.text.format is not None:
        shape = response_grammar(body.text.format)
        if shape is not None and tools:
            raise ApiError(400, "text.format and tools: one answer is held to one of them", param="text")
        grammar = shape or grammar
    messages, options = await server.media.resolve(_messages(body))
    budget = body.thinking.budget_tokens if body.thinking else None
    params = body.params(max_tokens=body.max_output_tokens, thinking_budget=budget)
    return await server.service.chat(messages, params, tools=tools, thinking=mode, grammar=grammar,
                                     priority=body.priority, **options)  # fmt: skip


def _tool(tool: dict[str, Any], i: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise ApiError(400, f"tools[{i}]: of type {tool.get('type')!r}; this server has functions only", param="tools")
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}


# --- items to messages --------------------------------------------------------------------------------------------


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    """The request's items as OpenAI's chat messages: what one turn of the model gave becomes one message again."""
    out: list[dict[str, Any]] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    for i, item in enumerate(items):
        where, kind = f"input[{i}]", item.get("type", "message")
        if kind == "function_call_output":
            output = item.get("output")
            content = output if isinstance(output, str) else _parts(output, f"{where}.output")
            out.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
            continue
        role = item.get("role") if kind == "message" else "assistant"
        if role != "assistant":
            content = item.get("content")
            content = content if isinstance(content, str) else _parts(content, f"{where}.content")
            out.append({"role": role, "content": content})
            continue
        if not out or out[-1]["role"] != "assistant" or (kind == "reasoning" and out[-1].get("content") is not None):
            out.append({"role": "assistant", "content": None})
        _add(out[-1], item, kind, where)
    return out


def _add(message: dict[str, Any], item: dict[str, Any], kind: str, where: str) -> None:
    """Adds an item of the model's own to its message."""
    if kind == "reasoning":
        content = item.get("content") or []
        if not isinstance(content, list):
            raise ApiError(400, f"{where}.content: must be a list of parts", param="input")
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        message["reasoning_content"] = "".join(text for text in texts if isinstance(text, str))
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments", "")}
        message.setdefault("tool_calls", []).append({"id": item.get("call_id"), "type": "function",
                                                     "function": function})  # fmt: skip
    elif kind == "message":
        content = item.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else _parts(content, f"{where}.content")
        message["content"] = [*(message["content"] or ()), *parts]
    else:
        raise ApiError(400, f"{where}: an item of type {str(kind)[:60]!r}; must be message, function_call, "
                            "function_call_output or reasoning", param="input")  # fmt: skip


def _parts(content: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(content, list):
        raise ApiError(400, f"{where}: must be a string or a list of parts", param="input")
    return [_part(part, f"{where}[{i}]") for i, part in enumerate(content)]


def _part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in TEXTS:
        return {"type": "text", "text": part.get("text")}
    if kind not in ("input_image", "input_video"):
        raise ApiError(400, f"{where}: a part of type {str(kind)[:60]!r}; must be input_text, output_text, input_image "
                            "or input_video", param="input")  # fmt: skip
    name = kind.replace("input_", "") + "_url"
    url = part.get(name) or part.get("file_id")
    return {"type": name, name: {key: value for key, value in part.items() if key not in ("type", name)} | {"url": url}}


# --- answers ------------------------------------------------------------------------------------------------------


def _head(server: Server, body: ResponsesBody, stream: Stream) -> dict[str, Any]:
    params = stream.request.params
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "model": body.model or server.names[0],
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "store": False,
        "temperature": params.temperature,
        "text": {"format": {"type": "text"} if body.text is None or not body.text.format else body.text.format},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _ending(stream: Stream, reason: str) -> dict[str, Any]:
    prompt, cached, completion, thinking = stream.usage
    usage = {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": thinking},
        "total_tokens": prompt + completion,
    }
    if reason == "length":
        return {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}, "usage": usage}
    return {"status": "completed", "usage": usage}


def _items(answer: Answer) -> list[dict[str, Any]]:
    items = []
    if answer.reasoning:
        items.append(_reasoning_item(answer.reasoning))
    if answer.content:
        items.append(_message_item(answer.content))
    return items + [_call_item(call) for call in answer.calls]


def _reasoning_item(text: str) -> dict[str, Any]:
    return {"type": "reasoning", "id": new_id("rs_"), "summary": [], "status": "completed",
            "content": [{"type": "reasoning_text", "text": text}]}  # fmt: skip


def _message_item(text: str) -> dict[str, Any]:
    return {"type": "message", "id": new_id("msg_"), "role": "assistant", "status": "completed",
            "content": [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]}  # fmt: skip


def _call_item(call: ToolCall) -> dict[str, Any]:
    return {"type": "function_call", "id": new_id("fc_"), "call_id": new_id("call_"), "name": call.name,
            "arguments": arguments_json(call), "status": "completed"}  # fmt: skip


class _Events:
    """The stream's events, numbered. Of the items at most one is open, the last one."""

    def __init__(self, head: dict[str, Any], stream: Stream) -> None:
        self._head, self._stream = head, stream
        self._output: list[dict[str, Any]] = []
        self._open = ""  # the open item's type
        self._number = -1

    async def pieces(self) -> AsyncIterator[bytes]:
        yield self._event("response.created", response=self._head)
        yield self._event("response.in_progress", response=self._head)
        async for event in self._stream:
            if isinstance(event, Finish):
                for piece in self._close():
                    yield piece
                done = self._head | {"output": self._output} | _ending(self._stream, event.finish_reason)
                yield self._event(f"response.{done['status']}", response=done)
            else:
                for piece in self._more(event):
                    yield piece

    def _more(self, event: ThinkingDelta | ContentDelta | ToolCall) -> list[bytes]:
        if isinstance(event, ToolCall):
            item = _call_item(event)
            out = [*self._close(), *self._add(item, item | {"arguments": "", "status": "in_progress"})]
            place = {"item_id": item["id"], "output_index": len(self._output) - 1}
            name = "response.function_call_arguments"
            out.append(self._event(f"{name}.delta", delta=item["arguments"], **place))
            out.append(self._event(f"{name}.done", arguments=item["arguments"], name=item["name"], **place))
            return [*out, *self._close()]
        kind = "reasoning" if isinstance(event, ThinkingDelta) else "message"
        out = []
        if self._open != kind:
            item = _reasoning_item("") if kind == "reasoning" else _message_item("")
            out = [*self._close(), *self._add(item, item | {"content": [], "status": "in_progress"})]
            out.append(self._event("response.content_part.added", part=dict(item["content"][0]), **self._place()))
        self._output[-1]["content"][0]["text"] += event.text
        more = {} if kind == "reasoning" else {"logprobs": []}
        return [*out, self._event(f"{self._name()}.delta", delta=event.text, **self._place(), **more)]

    def _add(self, item: dict[str, Any], begun: dict[str, Any]) -> list[bytes]:
        self._output.append(item)
        self._open = item["type"]
        return [self._event("response.output_item.added", output_index=len(self._output) - 1, item=begun)]

    def _close(self) -> list[bytes]:
        if not self._open:
            return []
        out, item = [], self._output[-1]
        if self._open != "function_call":
            part = item["content"][0]
            more = {} if self._open == "reasoning" else {"logprobs": []}
            out.append(self._event(f"{self._name()}.done", text=part["text"], **self._place(), **more))
            out.append(self._event("response.content_part.done", part=part, **self._place()))
        self._open = ""
        return [*out, self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)]

    def _name(self) -> str:
        return "response.reasoning_text" if self._open == "reasoning" else "response.output_text"

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return sse({"type": kind, "sequence_number": self._number} | fields, kind)
