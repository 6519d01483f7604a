"""Anthropic's /v1/messages and /v1/messages/count_tokens: the same conversations in other words."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from openm3.engine import Finish, Grammar
from openm3.engine.service import Stream
from openm3.processing import ContentDelta, ThinkingDelta
from openm3.serve.errors import ANTHROPIC_ERRORS, ANTHROPIC_PATH, STREAMED, ApiError, error_body, json_response
from openm3.serve.generation import (
    EFFORTS,
    Answer,
    Body,
    EventStream,
    Loose,
    Sampling,
    Server,
    Thinking,
    arguments_json,
    attended,
    gathered,
    new_id,
    sse,
    submitted,
    thinking_mode,
    told,
)
from openm3.serve.grammars import response_grammar, tool_grammar
from openm3.serve.schemas import HELLO, Blocks, FlatFormat, Texts, example

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class Tool(Loose):
    name: str
    description: str | None = None
    input_schema: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    type: str | None = None
    strict: bool = False


class ToolChoice(Loose):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class OutputConfig(Loose):
    effort: str | None = told(enum=[*EFFORTS, None])
    format: FlatFormat | None = None


class Turn(Loose):
    role: Literal["user", "assistant", "system"]
    content: str | Blocks


class CountBody(Body):
    """The fields from `metadata` on are taken and have no effect here."""

    model_config = example(messages=HELLO)

    messages: list[Turn] = Field(json_schema_extra={"minItems": 1})
    model: str
    system: str | Texts | None = None
    thinking: Thinking | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    metadata: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None
    service_tier: str | None = None


class MessagesBody(CountBody):
    model_config = example(messages=HELLO, max_tokens=16)

    max_tokens: int = Field(json_schema_extra={"minimum": 1})
    stream: bool = False
    temperature: float | None = told(minimum=0, maximum=100)
    top_p: float | None = told(exclusiveMinimum=0, maximum=1)
    top_k: int | None = told(minimum=-1)
    stop_sequences: list[str] | None = None


def router(server: Server) -> APIRouter:
    routes = APIRouter(tags=["anthropic"], responses=ANTHROPIC_ERRORS)

    @routes.post(ANTHROPIC_PATH, responses=STREAMED)
    async def messages(body: MessagesBody, request: Request) -> Response:
        """Answers a conversation, whole or as a stream of events."""
        server.check_model(body.model)
        [stream] = await submitted(request, server, _submit(server, body))
        head = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": body.model}
        if body.stream:
            return EventStream(request, [stream], _events(head, stream),
                               lambda error: sse(error_body(error, ANTHROPIC_PATH), "error"))  # fmt: skip
        [answer] = await gathered(request, [stream])
        return json_response(head | {"content": _blocks(answer)} | _ending(stream, answer.finish_reason))

    @routes.post(f"{ANTHROPIC_PATH}/count_tokens")
    async def count_tokens(body: CountBody, request: Request) -> Response:
        """How many tokens a conversation's prompt has."""
        server.check_model(body.model)
        prompt, options, _ = await _prompt(server, body)
        prepared = await attended(request, server.service.prompt(prompt, **options))
        return json_response({"input_tokens": len(prepared.input_ids)})

    return routes


async def _submit(server: Server, body: MessagesBody) -> list[Stream]:
    sampling = Sampling(temperature=body.temperature, top_p=body.top_p, top_k=body.top_k, stop=body.stop_sequences)
    budget = body.thinking.budget_tokens if body.thinking else None
    params = sampling.params(max_tokens=body.max_tokens, thinking_budget=budget)
    messages, options, grammar = await _prompt(server, body)
    return await server.service.chat(messages, params, grammar=grammar, **options)


async def _prompt(server: Server, body: CountBody) -> tuple[list[Any], dict[str, Any], Grammar | None]:
    """(messages in OpenAI's shape with their media, what else the prompt is made of, what the answer is held to)."""
    config = body.output_config or OutputConfig()
    choice = body.tool_choice or ToolChoice(type="auto")
    named = {"type": "function", "function": {"name": choice.name}}
    wanted = {"any": "required", "tool": named}.get(choice.type, choice.type)
    tools, grammar = tool_grammar(
        wanted,
        [_tool(tool, i) for i, tool in enumerate(body.tools or ())] or None,
        not choice.disable_parallel_tool_use,
    )
    if config.format is not None:
        grammar = response_grammar(config.format)
    messages = [{"role": "system", "content": _text(body.system, "system")}] if body.system else []
    for i, turn in enumerate(body.messages):
        messages += _messages(turn, f"messages.{i}")
    messages, options = await server.media.resolve(messages)
    mode = thinking_mode(body.thinking, effort=config.effort)
    return messages, options | {"tools": tools, "thinking": mode}, grammar


def _tool(tool: Tool, i: int) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise ApiError(400, f"tools.{i}: type {tool.type[:60]!r} is a tool of Anthropic's own; this server runs none")
    function = {"name": tool.name, "parameters": tool.input_schema, "strict": tool.strict}
    return {"type": "function", "function": function | ({"description": tool.description} if tool.description else {})}


def _text(content: str | list[dict[str, Any]], where: str) -> str:
    if isinstance(content, str):
        return content
    wrong = [i for i, block in enumerate(content) if block.get("type") != "text" or type(block.get("text")) is not str]
    if wrong:
        raise ApiError(400, f"{where}.{wrong[0]}: must be a text block")
    return "\n\n".join(block["text"] for block in content)


def _messages(turn: Turn, where: str) -> list[dict[str, Any]]:
    """A message in OpenAI's shape: there, results of tools are messages of their own, and come first."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    if turn.role == "system":
        return [{"role": "system", "content": _text(turn.content, where)}]
    if turn.role == "assistant":
        return [_assistant(turn.content, where)]
    results, parts = [], []
    for i, block in enumerate(turn.content):
        place = f"{where}.content.{i}"
        if block.get("type") == "tool_result":
            content = block.get("content") or ""
            if not isinstance(content, str | list):
                raise ApiError(400, f"{place}.content: must be a string or a list of blocks")
            if isinstance(content, list):
                content = [_part(inner, f"{place}.content.{j}") for j, inner in enumerate(content)]
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content})
        else:
            parts.append(_part(block, place))
    return results + ([{"role": "user", "content": parts}] if parts or not results else [])


def _assistant(content: list[dict[str, Any]], where: str) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for i, block in enumerate(content):
        kind = block.get("type")
        if kind == "text":
            texts.append(block)
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking", "")))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input", {})}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind != "redacted_thinking":  # nobody can read what it holds
            raise ApiError(400, f"{where}.content.{i}: a block of type {kind!r}; an assistant's must be text, thinking "
                                "or tool_use")  # fmt: skip
    message: dict[str, Any] = {"role": "assistant", "content": _text(texts, where)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    return message | ({"tool_calls": calls} if calls else {})


def _part(block: Any, where: str) -> dict[str, Any]:
    """A text, image or video block as OpenAI's part."""
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "text":
        return {"type": "text", "text": block.get("text")}
    if kind not in ("image", "video"):
        raise ApiError(400, f"{where}: a block of type {kind!r}; must be text, image, video or tool_result")
    source = block.get("source")
    source = source if isinstance(source, dict) else {}
    form = source.get("type")
    if form == "base64":
        url = f"data:{source.get('media_type')};base64,{source.get('data')}"
    else:
        url = source.get("url") if form == "url" else source.get("file_id") if form == "file" else None
    if not isinstance(url, str):
        raise ApiError(400, f"{where}.source: must be of type base64, url or file, with media_type and data, url, or "
                            "file_id")  # fmt: skip
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


# --- answers ------------------------------------------------------------------------------------------------------


def _blocks(answer: Answer) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if answer.reasoning:
        blocks.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
    if answer.content:
        blocks.append({"type": "text", "text": answer.content})
    for call in answer.calls:
        blocks.append({"type": "tool_use", "id": new_id("toolu_"), "name": call.name, "input": call.arguments})
    return blocks


def _ending(stream: Stream, reason: str) -> dict[str, Any]:
    stop = stream.stop_string if reason == "stop" else None
    return {
        "stop_reason": "stop_sequence" if stop else STOP_REASONS.get(reason, "end_turn"),
        "stop_sequence": stop,
        "usage": _usage(stream),
    }


def _usage(stream: Stream) -> dict[str, int]:
    prompt, cached, completion, _ = stream.usage
    return {"input_tokens": prompt - cached, "cache_read_input_tokens": cached, "cache_creation_input_tokens": 0,
            "output_tokens": completion}  # fmt: skip


class _Blocks:
    """The content blocks of a stream: each event goes into the open block, or closes it and opens the next."""

    def __init__(self) -> None:
        self.index, self.kind = -1, ""

    def open(self, kind: str, block: dict[str, Any]) -> list[bytes]:
        out = self.close()
        self.index, self.kind = self.index + 1, kind
        return [*out, self._event("content_block_start", content_block={"type": kind} | block)]

    def delta(self, kind: str, **delta: Any) -> bytes:
        return self._event("content_block_delta", delta={"type": kind} | delta)

    def close(self) -> list[bytes]:
        if not self.kind:
            return []
        out = [self.delta("signature_delta", signature="")] if self.kind == "thinking" else []
        self.kind = ""
        return [*out, self._event("content_block_stop")]

    def _event(self, name: str, **fields: Any) -> bytes:
        return sse({"type": name, "index": self.index} | fields, name)


async def _events(head: dict[str, Any], stream: Stream) -> AsyncIterator[bytes]:
    start = head | {"content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(stream)}
    yield sse({"type": "message_start", "message": start}, "message_start")
    blocks = _Blocks()
    async for event in stream:
        if isinstance(event, Finish):
            for piece in blocks.close():
                yield piece
            ending = _ending(stream, event.finish_reason)
            usage = ending.pop("usage")
            yield sse({"type": "message_delta", "delta": ending, "usage": usage}, "message_delta")
        elif isinstance(event, ThinkingDelta | ContentDelta):
            kind = "thinking" if isinstance(event, ThinkingDelta) else "text"
            if blocks.kind != kind:
                for piece in blocks.open(kind, {kind: ""} | ({"signature": ""} if kind == "thinking" else {})):
                    yield piece
            yield blocks.delta(f"{kind}_delta", **{kind: event.text})
        else:
            for piece in blocks.open("tool_use", {"id": new_id("toolu_"), "name": event.name, "input": {}}):
                yield piece
            yield blocks.delta("input_json_delta", partial_json=arguments_json(event))
            for piece in blocks.close():
                yield piece
    yield sse({"type": "message_stop"}, "message_stop")
