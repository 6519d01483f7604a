"""`LLM`: a model, its processor and an engine behind three calls: generate, chat, chat_batch.

Streams are plain iterators on the caller's thread: asking one for its next piece steps the engine, and with it every
other stream. Closing an iterator, or leaving it by an exception, cancels its request and frees its pages.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from openm3.config import M3Config, read_json
from openm3.engine.core import Engine
from openm3.engine.guide import Guides
from openm3.engine.memory import cache_pages
from openm3.engine.output import ChatResult, Completion, Finish, TextOutput
from openm3.engine.request import Grammar, Media, MediaItem, Request, RequestError, SamplingParams, State, TooLongError
from openm3.engine.runner import Runner
from openm3.processing import ContentDelta, OutputParser, Processor, ThinkingDelta, ToolCall

if TYPE_CHECKING:
    from openm3.model import M3
    from openm3.processing import Prompt

M3_DEFAULTS = SamplingParams(temperature=1.0, top_p=0.95, top_k=40)
PREPARED_AHEAD = 16  # requests of a batch whose pictures are decoded before there is room for them

Event = ThinkingDelta | ContentDelta | ToolCall | Finish


class LLM:
    """A checkpoint ready to answer. name_or_dir: a directory, a Hugging Face repo id, or "openm3-nano".

    device: default CUDA where there is one; dtype: default float32 on a CPU, the checkpoint's on a GPU; cache_tokens:
    tokens that all running requests share, default by free memory; max_batch_tokens: most tokens of one step, which
    bounds how long a running stream waits for a prompt; decode_graphs: answers are decoded through CUDA graphs,
    which is the default on a GPU in half precision.
    """

    def __init__(
        self,
        name_or_dir: str | Path = "openm3-nano",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cache_tokens: int | None = None,
        max_batch_tokens: int = 2048,
        decode_graphs: bool | None = None,
    ) -> None:
        from openm3.checkpoint import load_model, resolve

        directory = resolve(name_or_dir)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = load_model(directory, device=device, dtype=dtype)
        processor = Processor.from_pretrained(directory, model.config)
        defaults, eos_ids = read_generation_config(directory)
        self._set_up(model, processor, defaults, eos_ids, cache_tokens, max_batch_tokens, decode_graphs)

    @classmethod
    def from_model(
        cls,
        model: M3,
        processor: Processor,
        *,
        defaults: SamplingParams = M3_DEFAULTS,
        cache_tokens: int | None = None,
        max_batch_tokens: int = 2048,
    ) -> LLM:
        """An LLM around a model in memory, on its device and in its dtype (one in training, say)."""
        llm = cls.__new__(cls)
        llm._set_up(model, processor, defaults.filled(M3_DEFAULTS), (), cache_tokens, max_batch_tokens)
        return llm

    def _set_up(
        self,
        model: M3,
        processor: Processor,
        defaults: SamplingParams,
        eos_ids: Iterable[int],
        cache_tokens: int | None,
        max_batch_tokens: int,
        decode_graphs: bool | None = None,
    ) -> None:
        self.model = model
        self.config: M3Config = model.config
        self.processor = processor
        self.defaults = defaults
        self.eos_ids = frozenset((*self.config.text.eos_token_ids, *eos_ids))
        weight = model.embed.weight
        pages = cache_pages(self.config, weight.device, weight.dtype, cache_tokens)
        page_size = self.config.text.sparse.block_size
        runner = Runner(model, pages, decode_graphs=decode_graphs)
        self.guides = Guides(processor.tokenizer, self.eos_ids)
        self.engine = Engine(
            runner,
            num_pages=pages,
            page_size=page_size,
            max_batch_tokens=max_batch_tokens,
            guides=self.guides.guide,
            ahead=weight.is_cuda,
        )

    @property
    def device(self) -> torch.device:
        return self.engine.runner.device

    def generate(
        self,
        prompts: str | list[str],
        params: SamplingParams | None = None,
        *,
        grammar: Grammar | None = None,
        stream: bool = False,
    ) -> list[Completion] | Iterator[str]:
        """Continues texts as they are, without a chat template, all in one batch; special tokens count where they are
        spelled. Each text has params.n completions, one after the other. stream=True (one text, n = 1): an iterator of
        pieces of the answer.

        Raises RequestError (a ValueError) for a text that is empty or does not fit, or a grammar that is none.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if stream and len(texts) != 1:
            raise RequestError(f"generate: {len(texts)} prompts with stream=True, must be one; stream them one by one")
        _require_one(params, stream)
        encode = self.processor.tokenizer.encode
        requests = [r for text in texts for r in self.requests(encode(text, specials=True), params, grammar)]
        if stream:
            return self._stream(requests[0])
        return [
            Completion(r.output.take(), r.output_ids, r.finish_reason, len(r.prompt_ids), r.logprobs, r.prompt_logprobs)
            for r in self._run(requests)
        ]

    def chat(
        self,
        messages: list[dict[str, Any]],
        params: SamplingParams | None = None,
        *,
        thinking: str = "adaptive",
        tools: list[dict[str, Any]] | None = None,
        grammar: Grammar | None = None,
        stream: bool = False,
        image_options: Any = None,
        video_options: Any = None,
    ) -> ChatResult | list[ChatResult] | Iterator[Event]:
        """Answers a conversation in the OpenAI shape (text, image and video parts, tool calls and results).

        stream=True: an iterator of events as they come (ThinkingDelta, ContentDelta, ToolCall), the last one a Finish.
        grammar: what the answer must be, after its thinking. With params.n > 1 a list of so many answers.
        Bad messages, media or tools raise a ValueError here, before anything runs.
        """
        prompt = self._prompt(messages, thinking, tools, image_options, video_options)
        _require_one(params, stream)
        requests = self.requests(prompt, params, grammar)
        if len(requests) > 1:
            return [_answer(request, OutputParser(tools, prompt.thinking)) for request in self._run(requests)]
        events = self._events(requests[0], OutputParser(tools, prompt.thinking))
        return events if stream else _collect(events)

    def chat_batch(
        self,
        conversations: list[list[dict[str, Any]]],
        params: SamplingParams | None = None,
        *,
        thinking: str | list[str] = "adaptive",
        tools: list[dict[str, Any]] | list[list[dict[str, Any]] | None] | None = None,
        image_options: Any = None,
        video_options: Any = None,
    ) -> list[ChatResult]:
        """Answers many conversations in one continuous batch; thinking and tools: one for all or a list of one each."""
        n = len(conversations)
        if params is not None and params.n > 1:
            raise RequestError(f"n = {params.n}: chat_batch gives each conversation one answer; use chat")
        modes = [thinking] * n if isinstance(thinking, str) else thinking
        one_each = tools is not None and any(t is None or isinstance(t, list) for t in tools)
        toolsets = tools if one_each else [tools] * n
        if not len(modes) == len(toolsets) == n:
            raise RequestError(
                f"chat_batch: {n} conversations, {len(modes)} thinking modes, {len(toolsets)} tool lists"
            )
        parsers = []

        def requests() -> Iterator[Request]:
            for messages, mode, toolset in zip(conversations, modes, toolsets):
                prompt = self._prompt(messages, mode, toolset, image_options, video_options)
                parsers.append(OutputParser(toolset, prompt.thinking))
                yield from self.requests(prompt, params)

        done = self._run(requests())
        return [_answer(request, parser) for request, parser in zip(done, parsers)]

    def _prompt(self, messages: Any, thinking: str, tools: Any, image_options: Any, video_options: Any) -> Prompt:
        options = {"image_options": image_options, "video_options": video_options}
        options = {name: value for name, value in options.items() if value is not None}
        return self.processor.prepare(messages, tools=tools, thinking=thinking, **options)

    def requests(
        self, prompt: Prompt | list[int], params: SamplingParams | None = None, grammar: Grammar | None = None
    ) -> list[Request]:
        """The params.n requests of a prompt, or of token ids as they are, for `engine.add`; a seed counts up.

        Raises RequestError for one that cannot fit, or a grammar that is none."""
        wanted = _each(params)
        if isinstance(prompt, list):
            return [self._request(prompt, p, grammar=grammar) for p in wanted]
        media = prompt.images, prompt.videos
        return [self._request(prompt.input_ids, p, *media, grammar=grammar, thinking=prompt.thinking) for p in wanted]

    def _request(
        self,
        ids: list[int],
        params: SamplingParams | None,
        images: Iterable[Any] = (),
        videos: Iterable[Any] = (),
        *,
        grammar: Grammar | None = None,
        thinking: str | None = None,
    ) -> Request:
        """A request that will fit; RequestError otherwise, with the tokens needed and available."""
        if not ids:
            raise RequestError("the prompt is empty: it must have at least one token")
        params = (params or SamplingParams()).filled(self.defaults)
        room = self._room(len(ids))
        request = Request(
            prompt_ids=ids,
            params=params,
            max_tokens=min(params.max_tokens or room, room),
            eos_ids=self.eos_ids,
            seed=random.getrandbits(64) if params.seed is None else params.seed,
            media=_media(ids, list(images), list(videos), self.config),
            output=TextOutput(self.processor.tokenizer.stream(), params.stop),
            grammar=grammar,
            thinking=thinking,
        )
        request.guide = self.guides.guide(request)
        return request

    def _room(self, prompt_tokens: int) -> int:
        """How many tokens an answer can have after such a prompt."""
        context, capacity = self.config.text.max_position_embeddings, self.engine.scheduler.capacity
        needed = prompt_tokens + 1
        if needed > context:
            raise TooLongError(
                f"the prompt has {prompt_tokens} tokens and needs {needed} with an answer; the model's context is "
                f"{context} tokens (max_position_embeddings): shorten the prompt"
            )
        if needed > capacity:
            raise TooLongError(
                f"the prompt has {prompt_tokens} tokens and needs {needed} with an answer; the cache holds {capacity} "
                f"tokens: raise cache_tokens or shorten the prompt"
            )
        return min(context, capacity) - prompt_tokens

    def _run(self, requests: Iterable[Request]) -> list[Request]:
        """Runs requests to their end, all together; on an exception none of them is left in the engine."""
        started: list[Request] = []
        try:
            for request in requests:
                started.append(request)
                self.engine.add(request)
                while len(self.engine.scheduler.waiting) > PREPARED_AHEAD:
                    self.engine.step()
            for request in started:
                while request.state is not State.FINISHED:
                    self.engine.step()
                if request.error is not None:
                    raise request.error
        finally:
            for request in started:
                self.engine.cancel(request)
        return started

    def _stream(self, request: Request) -> Iterator[str]:
        """The answer's text piece by piece. The request enters the engine with the first piece asked for."""
        try:
            self.engine.add(request)
            while True:
                if text := request.output.take():
                    yield text
                elif request.error is not None:
                    raise request.error
                elif request.state is State.FINISHED:
                    return
                else:
                    self.engine.step()
        finally:
            self.engine.cancel(request)

    def _events(self, request: Request, parser: OutputParser) -> Iterator[Event]:
        pieces = self._stream(request)
        try:
            yield from _parsed(request, parser, pieces)
        finally:
            pieces.close()


def read_generation_config(directory: Path) -> tuple[SamplingParams, tuple[int, ...]]:
    """(the model's sampling defaults, its ending tokens) of a checkpoint's generation_config.json, if it has one."""
    path = directory / "generation_config.json"
    raw = read_json(path) if path.exists() else {}
    try:
        temperature = 0.0 if raw.get("do_sample") is False else raw.get("temperature")
        top_p, top_k, most = (raw.get(name) for name in ("top_p", "top_k", "max_new_tokens"))
        defaults = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=most)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None
    eos = raw.get("eos_token_id")
    return defaults.filled(M3_DEFAULTS), () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def _media(ids: list[int], images: list[Any], videos: list[Any], config: M3Config) -> Media | None:
    """Which placeholder shows which row of the images' embeddings followed by the videos'; counts must match."""
    n_image, n_video = sum(m.tokens for m in images), sum(m.tokens for m in videos)
    rows = {config.image_token_id: count(0), config.video_token_id: count(n_image)}
    positions = [i for i, token in enumerate(ids) if token in rows]
    for kind, token, given in (("image", config.image_token_id, n_image), ("video", config.video_token_id, n_video)):
        found = ids.count(token)
        if found != given:
            have = f"its {kind}s give {given} embeddings" if given else f"no {kind}"
            raise RequestError(f"{found} {kind} placeholder tokens in the prompt, {have}")
    if not positions:
        return None

    items = [MediaItem(m.pixels, m.grid_thw, m.tokens, m.digest) for m in (*images, *videos)]
    return Media(items, positions, rows=[next(rows[ids[i]]) for i in positions])


def _require_one(params: SamplingParams | None, stream: bool) -> None:
    if stream and params is not None and params.n > 1:
        raise RequestError(f"n = {params.n}: must be 1 with stream=True")


def _each(params: SamplingParams | None) -> list[SamplingParams | None]:
    """The parameters of each of n answers; a seed counts up."""
    if params is None or params.n == 1:
        return [params]
    seeds = [None if params.seed is None else params.seed + i for i in range(params.n)]
    return [dataclasses.replace(params, seed=seed, n=1) for seed in seeds]


def _parsed(request: Request, parser: OutputParser, pieces: Iterator[str]) -> Iterator[Event]:
    """An answer's text as events, the last one its Finish."""
    called = False
    for text in chain(pieces, (None,)):
        for event in parser.finish() if text is None else parser.feed(text):
            called |= isinstance(event, ToolCall)
            yield event
    reason = "tool_calls" if called and request.finish_reason == "stop" else request.finish_reason
    yield Finish(reason, len(request.prompt_ids), request.generated)


def _answer(request: Request, parser: OutputParser) -> ChatResult:
    return _collect(_parsed(request, parser, iter((request.output.take(),))))


def _collect(events: Iterable[Event]) -> ChatResult:
    events = list(events)
    reasoning = "".join(e.text for e in events if isinstance(e, ThinkingDelta))
    content = "".join(e.text for e in events if isinstance(e, ContentDelta))
    calls = [e for e in events if isinstance(e, ToolCall)]
    end = events[-1]
    return ChatResult(content, reasoning or None, calls, end.finish_reason, end.prompt_tokens, end.completion_tokens)
