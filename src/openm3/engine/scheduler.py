"""Who computes what in the next step: a pure state machine, waiting -> running -> finished, that knows no tensor.

A step is one packed batch of at most `max_batch_tokens` tokens. Running answers get their one token first, prompts
share the rest in chunks, so a long prompt never starves a stream. A request enters, in order of arrival, when the
pages of all its known tokens are free; when an answer needs a page and none is left, the youngest request gives up its
pages and is computed again later. The oldest therefore always advances, and everyone finishes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from openm3.engine.pages import PagePool
from openm3.engine.request import Request, RequestError, State


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of a request, computed in one step; `samples`: up to its newest, so the next can be drawn."""

    request: Request
    start: int
    end: int
    samples: bool


@dataclass(frozen=True)
class ScheduledBatch:
    chunks: list[Chunk]

    @property
    def sampling(self) -> list[Request]:
        """The requests that get a token from this step, in the order of their logits."""
        return [chunk.request for chunk in self.chunks if chunk.samples]


class Scheduler:
    """Owns the pages. `schedule` names the next step's work, `advance` takes its tokens, `finish` ends a request."""

    def __init__(self, pool: PagePool, page_size: int, *, max_batch_tokens: int = 2048, max_running: int = 256) -> None:
        if max_batch_tokens < 1:
            raise RequestError(f"max_batch_tokens = {max_batch_tokens}: must be at least 1")
        self.pool = pool
        self.page_size = page_size
        self.max_batch_tokens = max_batch_tokens
        self.max_running = min(max_running, max_batch_tokens)  # every running answer gets its token each step
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # both in order of arrival; all that run came before all that wait
        self._arrivals = 0

    @property
    def capacity(self) -> int:
        """Tokens that the whole pool holds."""
        return self.pool.num_pages * self.page_size

    def add(self, request: Request) -> None:
        """Queues a request. RequestError if it could not fit even with the pool to itself."""
        needed = len(request.prompt_ids) + request.max_tokens
        if needed > self.capacity:
            raise RequestError(
                f"the request needs {needed} tokens of cache (prompt {len(request.prompt_ids)} + max_tokens "
                f"{request.max_tokens}), the cache holds {self.capacity}; raise cache_tokens or shorten the request"
            )
        request.arrival = self._arrivals
        self._arrivals += 1
        self.waiting.append(request)

    def schedule(self) -> ScheduledBatch | None:
        """The next step's batch, its pages allocated; None if there is nothing to do."""
        for request in list(self.running):  # answers first: their next token may need one page more
            if request.state is State.RUNNING and request.computed + 1 == len(request.token_ids):
                self._grow(request)
        self._admit()
        decodes = [r for r in self.running if r.computed + 1 == len(r.token_ids)]
        prefills = [r for r in self.running if r.computed + 1 < len(r.token_ids)]
        chunks, budget = [], self.max_batch_tokens
        for request in decodes + prefills:
            start, known = request.computed, len(request.token_ids)
            end = min(known, start + budget)
            if start == end:
                break
            chunks.append(Chunk(request, start, end, samples=end == known))
            budget -= end - start
        return ScheduledBatch(chunks) if chunks else None

    def advance(self, batch: ScheduledBatch, tokens: list[int]) -> None:
        """Records that a batch was computed; `tokens` are the new ones of batch.sampling, in its order."""
        for request, token in zip(batch.sampling, tokens, strict=True):
            request.token_ids.append(token)
        for chunk in batch.chunks:  # last: an interrupt before it costs a recomputation only
            chunk.request.computed = chunk.end

    def finish(self, request: Request, reason: str) -> None:
        """Ends a request at any stage and takes its pages back; one that has ended already stays as it is."""
        if request.state is State.FINISHED:
            return
        request.finish_reason, request.state = reason, State.FINISHED
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        self._free_pages(request)

    def reset(self) -> None:
        """All unfinished requests wait again, all pages are free: the way out of bookkeeping that broke off midway."""
        unfinished = {r for r in (*self.running, *self.waiting) if r.state is not State.FINISHED}
        self.waiting = deque(sorted(unfinished, key=lambda r: r.arrival))
        self.running = []
        self.pool = PagePool(self.pool.num_pages)
        for request in self.waiting:
            request.state, request.pages, request.computed = State.WAITING, [], 0

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _admit(self) -> None:
        """Waiting requests enter while pages last, one for each that runs left over (or they would be out soon)."""
        while self.waiting and len(self.running) < self.max_running:
            request = self.waiting[0]
            needed = self._pages_for(len(request.token_ids))
            if needed + len(self.running) > self.pool.free and not (not self.running and needed <= self.pool.free):
                return
            request.pages = self.pool.allocate(needed)
            request.state = State.RUNNING
            self.running.append(request)
            self.waiting.popleft()

    def _grow(self, request: Request) -> None:
        """Makes room for an answer's newest token, from the youngest request (itself, maybe) if no page is free."""
        missing = self._pages_for(len(request.token_ids)) - len(request.pages)
        while missing > self.pool.free and request.state is State.RUNNING:
            self._preempt(self.running[-1])
        if missing > 0 and request.state is State.RUNNING:
            request.pages += self.pool.allocate(missing, after=request.pages[-1])

    def _preempt(self, request: Request) -> None:
        self.waiting.appendleft(request)
        self.running.remove(request)
        self._free_pages(request)
        request.state = State.WAITING

    def _free_pages(self, request: Request) -> None:
        pages, request.pages, request.computed = request.pages, [], 0
        self.pool.release(pages)
