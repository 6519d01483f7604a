"""OpenAI's /v1/completions: texts or token ids continued as they are; with `echo` and `logprobs`, scored."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from openm3.engine import Finish, Grammar, TokenLogprobs
from openm3.engine.service import Stream
from openm3.processing import Tokenizer
from openm3.serve.chat import MIN_LOGPROB
from openm3.serve.errors import OPENAI_ERRORS, STREAMED, ApiError, error_body, json_response
from openm3.serve.generation import (
    EventStream,
    Sampling,
    Server,
    StreamOptions,
    gathered,
    merged,
    new_id,
    sse,
    submitted,
)
from openm3.serve.grammars import StructuredOutputs, response_grammar, structured_grammar
from openm3.serve.schemas import Format, example

PATH = "/v1/completions"
DEFAULT_TOKENS = 16


class CompletionBody(Sampling):
    """The fields from `best_of` on are taken in their default only, or have no effect here."""

    model_config = example(prompt="The colour of the", max_tokens=4)

    prompt: str | list[str] | list[int] | list[list[int]] = Field(json_schema_extra={"minLength": 1, "minItems": 1})
    model: str | None = None
    max_tokens: int | None = Field(DEFAULT_TOKENS, ge=0)
    n: int = Field(1, json_schema_extra={"minimum": 1})
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: Format | None = None
    structured_outputs: StructuredOutputs | None = None
    best_of: int | None = None
    suffix: str | None = None
    user: str | None = None


def router(server: Server) -> APIRouter:
    routes = APIRouter(tags=["openai"], responses=OPENAI_ERRORS)

    @routes.post(PATH, responses=STREAMED)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continues one text or several, each n times; choices come prompt by prompt."""
        server.check_model(body.model)
        prompts = _prompts(body, server)
        streams = await submitted(request, server, _submit(server, body, prompts))
        head = {"id": new_id("cmpl-"), "object": "text_completion", "created": int(time.time()),
                "model": body.model or server.names[0]}  # fmt: skip
        if body.stream:
            return EventStream(request, streams, _chunks(server, head, streams, body),
                               lambda error: sse(error_body(error, PATH)))  # fmt: skip
        answers = await gathered(request, streams)
        choices = []
        for i, (answer, stream) in enumerate(zip(answers, streams)):
            text = _echoed(stream, server) if body.echo else ""
            reason = answer.finish_reason if body.max_tokens != 0 else "length"
            choices.append({"index": i, "text": text + (answer.content if body.max_tokens != 0 else ""),
                            "finish_reason": reason, "logprobs": _logprobs(server, stream, body)[0]})  # fmt: skip
        return json_response(head | {"choices": choices, "usage": _usage(streams, body)})

    return routes


def _prompts(body: CompletionBody, server: Server) -> list[str | list[int]]:
    """The request's prompts, one or several; ApiError for what this server cannot do with them."""
    given = body.prompt
    prompts = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if not prompts:
        raise ApiError(400, "prompt: empty", param="prompt")
    limit = server.options.max_choices
    if not 1 <= body.n <= limit:
        raise ApiError(400, f"n = {body.n}: must be from 1 to {limit}", param="n")
    if len(prompts) > server.options.max_requests:
        raise ApiError(400, f"prompt: {len(prompts)} prompts; at most {server.options.max_requests}", param="prompt")
    if body.suffix or (body.best_of or body.n) != body.n:
        raise ApiError(400, "suffix, and best_of other than n: not supported",
                       param="suffix" if body.suffix else "best_of")  # fmt: skip
    if body.stream and body.echo and body.logprobs is not None:
        raise ApiError(400, "echo with logprobs cannot be streamed", param="stream")
    return prompts


async def _submit(server: Server, body: CompletionBody, prompts: list[str | list[int]]) -> list[Stream]:
    grammar: Grammar | None = response_grammar(body.response_format) or structured_grammar(body.structured_outputs)
    params = body.params(
        n=body.n,
        max_tokens=max(body.max_tokens, 1) if body.max_tokens is not None else None,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    return await server.service.complete(prompts, params, grammar=grammar, priority=body.priority)


def _echoed(stream: Stream, server: Server) -> str:
    return server.service.llm.processor.tokenizer.decode(stream.request.prompt_ids)


def _records(stream: Stream, body: CompletionBody) -> list[TokenLogprobs | None]:
    """The log-probabilities that the choice shows: of the prompt where it is echoed, of the answer with its end token,
    which the text leaves out. lm-eval counts on it: of an echo it takes all but the one token that it had to ask for.
    """
    answer = [] if body.max_tokens == 0 else stream.request.logprobs
    return [*(stream.request.prompt_logprobs if body.echo else ()), *answer]


def _logprobs(
    server: Server, stream: Stream, body: CompletionBody, start: tuple[int, int] = (0, 0)
) -> tuple[dict[str, list[Any]] | None, tuple[int, int]]:
    """(OpenAI's older form of logprobs, from `start` on, where they end), places in tokens and characters: parallel
    lists, the first token of an echoed prompt without a value."""
    if body.logprobs is None:
        return None, start
    tokenizer, (first, offset) = server.service.llm.processor.tokenizer, start
    ids = [*(stream.request.prompt_ids if body.echo else ()), *stream.request.output_ids]
    records, offsets = _records(stream, body)[first:], [offset]
    ids = ids[first : first + len(records)]
    for token in ids:
        offsets.append(offsets[-1] + len(tokenizer.token_bytes(token).decode(errors="replace")))
    logprobs = {
        "tokens": [_token(tokenizer, token) for token in ids],
        "token_logprobs": [None if r is None else max(r.logprob, MIN_LOGPROB) for r in records],
        "top_logprobs": [None if r is None else _top(tokenizer, r) for r in records],
        "text_offset": offsets[:-1],
    }
    return logprobs, (first + len(records), offsets[-1])


def _top(tokenizer: Tokenizer, record: TokenLogprobs) -> dict[str, float]:
    """The likeliest tokens at a place, its own token always among them."""
    pairs = [*record.top, (record.token, record.logprob)]
    return {_token(tokenizer, token): max(value, MIN_LOGPROB) for token, value in pairs}


def _token(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; of bytes that are no UTF-8, their hexadecimal form, so that two of them stay two."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _usage(streams: list[Stream], body: CompletionBody) -> dict[str, Any]:
    first = streams[:: body.n]  # a prompt counts once, however many answers it has
    prompt = sum(stream.usage[0] for stream in first)
    completion = 0 if body.max_tokens == 0 else sum(stream.usage[2] for stream in streams)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(stream.usage[1] for stream in first)}}  # fmt: skip


async def _chunks(
    server: Server, head: dict[str, Any], streams: list[Stream], body: CompletionBody
) -> AsyncIterator[bytes]:
    sent = [(0, 0)] * len(streams)  # tokens and characters whose logprobs are out

    def chunk(i: int, text: str, reason: str | None = None) -> bytes:
        logprobs, sent[i] = _logprobs(server, streams[i], body, sent[i])
        return sse(head | {"choices": [{"index": i, "text": text, "finish_reason": reason, "logprobs": logprobs}]})

    if body.echo:
        for i, stream in enumerate(streams):
            yield chunk(i, _echoed(stream, server))
    async for i, event in merged(streams):
        if isinstance(event, Finish):
            yield chunk(i, "", event.finish_reason if body.max_tokens != 0 else "length")
        elif body.max_tokens != 0:
            yield chunk(i, event.text)
    if body.stream_options is not None and body.stream_options.include_usage:
        yield sse(head | {"choices": [], "usage": _usage(streams, body)})
    yield b"data: [DONE]\n\n"
