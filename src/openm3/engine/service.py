"""The engine on a thread of its own, behind asyncio: submit a request, iterate over its events, cancel it at any time.

One thread loads the model and steps the engine; it sleeps while there is nothing to do. Prompts are prepared (template,
media, tokens) on threads beside it. What a request meets, a failed step included, is delivered to that request only.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from openm3.engine.llm import LLM
from openm3.engine.output import Finish
from openm3.engine.request import Grammar, Request, RequestError, SamplingParams, State
from openm3.processing import ContentDelta, OutputParser, ThinkingDelta, ToolCall

if TYPE_CHECKING:
    from openm3.processing import Prompt

Event = ThinkingDelta | ContentDelta | ToolCall | Finish

log = logging.getLogger(__name__)


class Unavailable(Exception):
    """No request is taken now: the model is loading, the service is draining, or it has failed."""


class Busy(Exception):
    """As many requests are under way as may be."""


class StepFailed(Exception):
    """The engine failed at this request's work; the request has ended."""


class Meter(Protocol):
    """Who counts tokens and times; called on the engine's thread."""

    def tokens(self, seconds: float, count: int, first: bool) -> None:
        """`count` tokens came `seconds` after the ones before (`first`: after the request was submitted)."""

    def ended(self, reason: str, stream: Stream) -> None: ...


@dataclass(frozen=True)
class Stats:
    """The engine's state at one moment. pages_free: those that no running request needs, of which some are
    remembered for a prompt that begins like an earlier one; preemptions: since the start."""

    running: int
    waiting: int
    pages: int
    pages_free: int
    pages_remembered: int
    preemptions: int


class Stream:
    """One answer under way: an async iterator of its events, the last one a Finish.

    Belongs to the event loop it was submitted on. Iterating raises StepFailed if the engine failed at this request.
    `cancel` ends it early; a stream that nobody reads any more must be cancelled, or it is computed to its end.
    """

    def __init__(self, service: Service, request: Request, parser: OutputParser | None) -> None:
        self.request = request
        self.reasoning_tokens = 0
        self.done = False
        self._service, self._parser = service, parser
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        self._called = False
        self._seen, self._seen_at = 0, time.monotonic()  # tokens, and when the newest of them came

    @property
    def usage(self) -> tuple[int, int, int, int]:
        """(prompt tokens, of them reused from the cache, generated tokens, of them thinking)."""
        request = self.request
        return len(request.prompt_ids), request.cached, request.generated, self.reasoning_tokens

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer, if one did."""
        return self.request.output.stops.found

    def cancel(self) -> None:
        """Ends the request and frees its pages; nothing happens if it has ended already. From any thread."""
        if not self.done:
            self._service._commands.put(("cancel", self))

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if self.done and self._events.empty():
            raise StopAsyncIteration
        event = await self._events.get()
        if isinstance(event, BaseException):
            raise event
        return event

    # --- on the engine's thread ---

    def _advance(self) -> list[Event | BaseException]:
        """What the last step brought for the reader."""
        request = self.request
        meter, now = self._service.meter, time.monotonic()
        if meter and request.generated > self._seen:
            meter.tokens(now - self._seen_at, request.generated - self._seen, first=not self._seen)
        if request.generated > self._seen:
            self._seen, self._seen_at = request.generated, now
        text, ended = request.output.take(), request.state is State.FINISHED
        if self._parser is None:
            events: list[Any] = [ContentDelta(text)] if text else []
        else:
            events = list(self._parser.feed(text)) if text else []
            events += self._parser.finish() if ended else []
        for event in events:
            self._called |= isinstance(event, ToolCall)
            if isinstance(event, ThinkingDelta):
                self.reasoning_tokens = request.generated
        if ended and request.finish_reason == "error":
            events.append(failure(request.error))
        elif ended:
            called = self._called and request.finish_reason == "stop"
            reason = "tool_calls" if called else request.finish_reason
            events.append(Finish(reason, len(request.prompt_ids), request.generated))
        return events

    def _deliver(self, events: list[Event | BaseException]) -> None:
        for event in events:
            self._events.put_nowait(event)
            self.done |= isinstance(event, Finish | BaseException)


class Service:
    """`start` it, then `chat`, `complete` and `prompt` from any event loop; `drain` and `close` at the end.

    load: gives the LLM, on the engine's thread; max_requests: requests under way at once, waiting ones included;
    workers: threads that prepare prompts.
    """

    def __init__(
        self, load: Callable[[], LLM], *, max_requests: int = 256, workers: int = 2, meter: Meter | None = None
    ) -> None:
        self.max_requests, self.meter = max_requests, meter
        self.error: BaseException | None = None
        self.draining = False
        self._load = load
        self._llm: LLM | None = None
        self._commands: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._live: list[Stream] = []  # the engine's thread's own
        self._under_way = 0  # admitted and not yet ended, those whose prompt is being prepared included
        self._lock = threading.Lock()
        self._loaded = threading.Event()
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="openm3-prepare")
        self._thread = threading.Thread(target=self._run, daemon=True, name="openm3-engine")

    # --- its life ---

    def start(self) -> None:
        """Begins to load the model, in the background."""
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Blocks until the model is loaded; raises what its loading raised, TimeoutError after `seconds`."""
        if not self._loaded.wait(seconds):
            raise TimeoutError(f"the model is not loaded after {seconds} seconds")
        if self.error is not None:
            raise self.error

    @property
    def ready(self) -> bool:
        """Whether a request would be taken now."""
        return self._llm is not None and self.error is None and not self.draining

    @property
    def llm(self) -> LLM:
        """The model; Unavailable while there is none, or none any more."""
        if self.error is not None:
            raise Unavailable(f"the model has failed: {type(self.error).__name__}")
        if self._llm is None:
            raise Unavailable("the model is loading")
        return self._llm

    @property
    def under_way(self) -> int:
        """Requests admitted and not yet ended."""
        return self._under_way

    def stats(self) -> Stats:
        """Queue and pages now; Unavailable before the model is loaded."""
        scheduler = self.llm.engine.scheduler
        pool = scheduler.pool
        return Stats(len(scheduler.running), len(scheduler.waiting), pool.num_pages, pool.free, pool.remembered,
                     scheduler.preemptions)  # fmt: skip

    async def drain(self, seconds: float | None = None) -> bool:
        """Takes no more requests and waits until those under way have ended; False if some have not after `seconds`."""
        self.draining = True
        end = None if seconds is None else time.monotonic() + seconds
        while self._under_way:
            if end is not None and time.monotonic() > end:
                return False
            await asyncio.sleep(0.02)
        return True

    def close(self, seconds: float = 10.0) -> bool:
        """Cancels what is under way and ends the thread; False if it is still in a step after `seconds`."""
        self.draining = True
        self._commands.put(("close", None))
        self._workers.shutdown(wait=False, cancel_futures=True)
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    # --- requests ---

    async def prompt(self, messages: list[dict[str, Any]], **options: Any) -> Prompt:
        """The prompt of a conversation (`Processor.prepare`'s arguments), made beside the event loop.

        Raises Unavailable, and the processor's ValueErrors.
        """
        processor = self.llm.processor
        return await self._aside(lambda: processor.prepare(messages, **options))

    async def chat(
        self,
        messages: list[dict[str, Any]],
        params: SamplingParams,
        *,
        tools: list[dict[str, Any]] | None = None,
        grammar: Grammar | None = None,
        priority: int = 0,
        **options: Any,
    ) -> list[Stream]:
        """Answers a conversation `params.n` times; options: those of `Processor.prepare`.

        Raises Unavailable, Busy, RequestError for a prompt that does not fit, and the processor's ValueErrors.
        """

        def prepare(llm: LLM) -> list[tuple[Request, OutputParser | None]]:
            prompt = llm.processor.prepare(messages, tools=tools, **options)
            requests = llm.requests(prompt, params, grammar)
            for request in requests:
                request.priority = priority
            return [(request, OutputParser(tools, prompt.thinking)) for request in requests]

        return await self._submit(prepare, params.n)

    async def complete(
        self,
        prompts: list[str | list[int]],
        params: SamplingParams,
        *,
        grammar: Grammar | None = None,
        priority: int = 0,
    ) -> list[Stream]:
        """Continues each text, or list of token ids, `params.n` times, prompt by prompt.

        Raises Unavailable, Busy, and RequestError for a prompt that is empty, does not fit or has unknown ids.
        """

        def prepare(llm: LLM) -> list[tuple[Request, OutputParser | None]]:
            requests = [r for prompt in prompts for r in llm.requests(_ids(prompt, llm), params, grammar)]
            for request in requests:
                request.priority = priority
            return [(request, None) for request in requests]

        return await self._submit(prepare, len(prompts) * params.n)

    async def _submit(self, prepare: Callable[[LLM], list[tuple[Request, Any]]], count: int) -> list[Stream]:
        llm = self.llm
        if self.draining:
            raise Unavailable("the server is shutting down")
        with self._lock:
            if self._under_way + count > self.max_requests:
                raise Busy(f"{self._under_way} requests are under way and {count} more wanted, at most "
                           f"{self.max_requests} are taken; try again later")  # fmt: skip
            self._under_way += count
        begun = time.monotonic()
        try:
            prepared = await self._aside(lambda: prepare(llm))
        except BaseException:
            self._left(count)
            raise
        streams = [Stream(self, request, parser) for request, parser in prepared]
        for stream in streams:
            stream._seen_at = begun
            self._commands.put(("add", stream))
        return streams

    async def _aside(self, work: Callable[[], Any]) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._workers, work)
        except RuntimeError as error:
            if self.draining:
                raise Unavailable("the server is shutting down") from error
            raise

    def _left(self, count: int = 1) -> None:
        with self._lock:
            self._under_way -= count

    # --- the engine's thread ---

    def _run(self) -> None:
        try:
            self._llm = self._load()
        except BaseException as error:
            self.error = error
        self._loaded.set()
        if self._llm is None:
            return
        try:
            while self._take_commands():
                self._step()
        except BaseException as error:  # bookkeeping failed: nothing more can be trusted
            log.exception("the engine's thread has failed")
            self.error = error
            self._end_all(lambda stream: StepFailed("the engine has failed"))

    def _take_commands(self) -> bool:
        """Adds and cancels what was asked for, waiting while there is nothing to compute; False: it is time to end."""
        while True:
            try:
                kind, stream = self._commands.get(block=not self._live)
            except queue.Empty:
                return True
            if kind == "close":
                self._end_all(self._cancelled)
                return False
            if kind == "add":
                self._add(stream)
            elif stream in self._live:
                self._publish([(stream, [self._cancelled(stream)])])

    def _add(self, stream: Stream) -> None:
        try:
            self._llm.engine.add(stream.request)
        except RequestError as error:
            stream.request.state = State.FINISHED
            self._publish([(stream, [error])])
            return
        self._live.append(stream)

    def _step(self) -> None:
        engine = self._llm.engine
        try:
            if not engine.step():
                time.sleep(0.005)  # nothing could be computed, and not for want of requests
        except Exception as error:
            log.exception("a step of the engine has failed")
            failed = [s for s in self._live if s.request.state is not State.WAITING]
            for stream in failed:
                engine.cancel(stream.request)
            self._publish([(stream, [failure(error)]) for stream in failed])
        news = [(stream, stream._advance()) for stream in self._live]
        self._publish([(stream, events) for stream, events in news if events])

    def _cancelled(self, stream: Stream) -> Finish:
        self._llm.engine.cancel(stream.request)
        return Finish("cancelled", len(stream.request.prompt_ids), stream.request.generated)

    def _end_all(self, last: Callable[[Stream], Event | BaseException]) -> None:
        """Ends every stream there is, those still in the queue too."""
        while True:
            try:
                kind, stream = self._commands.get_nowait()
            except queue.Empty:
                break
            if kind == "add":
                self._live.append(stream)
        self._publish([(stream, [last(stream)]) for stream in self._live])

    def _publish(self, news: list[tuple[Stream, list[Event | BaseException]]]) -> None:
        """Hands events to their readers' loops; a stream that has ended leaves, and so does one whose loop is gone."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[Stream, list[Event | BaseException]]]] = {}
        for stream, events in news:
            loops.setdefault(stream._loop, []).append((stream, events))
            if isinstance(events[-1], Finish | BaseException):
                self._leave(stream, events[-1])
        for loop, batch in loops.items():
            try:
                loop.call_soon_threadsafe(_deliver_all, batch)
            except RuntimeError:  # the loop is closed: nobody reads any more
                for stream, _ in batch:
                    if stream in self._live:
                        self._leave(stream, self._cancelled(stream))

    def _leave(self, stream: Stream, last: Event | BaseException) -> None:
        if stream in self._live:
            self._live.remove(stream)
        self._left()
        if self.meter:
            self.meter.ended(last.finish_reason if isinstance(last, Finish) else "error", stream)


def failure(error: Exception | None) -> Exception:
    """What a reader is told of an error in the engine: a RequestError as it is, of others their type only."""
    if isinstance(error, RequestError):
        return error
    return StepFailed(f"the engine failed at this request ({type(error).__name__})")


def _deliver_all(batch: list[tuple[Stream, list[Event | BaseException]]]) -> None:
    for stream, events in batch:
        stream._deliver(events)


def _ids(prompt: str | list[int], llm: LLM) -> list[int]:
    if isinstance(prompt, str):
        return llm.processor.tokenizer.encode(prompt, specials=True)
    vocab = llm.config.text.vocab_size
    for token in prompt:
        if not 0 <= token < vocab:
            raise RequestError(f"prompt: token {token}: must be from 0 to {vocab - 1}")
    return list(prompt)
