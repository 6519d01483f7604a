"""Who computes what in the next step: a pure state machine, waiting -> running -> finished, that knows no tensor.

A step is one packed batch of at most `max_batch_tokens` tokens. Running answers get their one token first; of the
rest, the first prompt gets at least half and the shortest others what is left: a long prompt starves neither a stream
nor a short prompt. A request enters, by priority and then in order of arrival, when the pages of all its known tokens
are free. It holds the pages of the blocks that an earlier request computed; where a running one is about to compute
them, it waits for that. When pages run out, the last request in that order gives up its own and is computed again
later, from what is still remembered. The first therefore always advances, and everyone finishes.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from dataclasses import dataclass

from openm3.engine.pages import PagePool
from openm3.engine.prefix import extend_keys
from openm3.engine.request import Request, RequestError, State, TooLongError


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of a request, computed in one step; `samples`: up to its newest, so the next can be drawn."""

    request: Request
    start: int
    end: int
    samples: bool

    @property
    def tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class ScheduledBatch:
    """patches: of pictures and clips, that are encoded on the way."""

    chunks: list[Chunk]
    patches: int = 0

    @property
    def sampling(self) -> list[Request]:
        """The requests that get a token from this step, in the order of their logits."""
        return [chunk.request for chunk in self.chunks if chunk.samples]

    @property
    def tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.chunks)


def rank(request: Request) -> tuple[int, int]:
    """The order in which requests are served."""
    return -request.priority, request.arrival


class Scheduler:
    """Owns the pages. `schedule` names the next step's work, `advance` takes its tokens, `finish` ends a request."""

    def __init__(self, pool: PagePool, page_size: int, *, max_batch_tokens: int = 2048, max_running: int = 256) -> None:
        if max_batch_tokens < 1:
            raise RequestError(f"max_batch_tokens = {max_batch_tokens}: must be at least 1")
        self.pool = pool
        self.page_size = page_size
        self.max_batch_tokens = max_batch_tokens
        self.max_running = min(max_running, max_batch_tokens)  # every running answer gets its token each step
        self.waiting: list[Request] = []  # both by rank
        self.running: list[Request] = []
        self.preemptions = 0
        self._arrivals = 0
        self._changed = False  # whether anyone came or ended since the last `schedule`

    @property
    def capacity(self) -> int:
        """Tokens that the whole pool holds."""
        return self.pool.num_pages * self.page_size

    def add(self, request: Request) -> None:
        """Queues a request. RequestError if it could not fit even with the pool to itself."""
        needed = len(request.prompt_ids) + request.max_tokens
        if needed > self.capacity:
            raise TooLongError(
                f"the request needs {needed} tokens of cache (prompt {len(request.prompt_ids)} + max_tokens "
                f"{request.max_tokens}), the cache holds {self.capacity}; raise cache_tokens or shorten the request"
            )
        request.arrival = self._arrivals
        self._arrivals += 1
        self._changed = True
        insort(self.waiting, request, key=rank)

    def expired(self, now: float) -> list[Request]:
        """The unfinished requests whose deadline has passed."""
        return [r for r in (*self.running, *self.waiting) if r.deadline is not None and r.deadline <= now]

    def schedule(
        self, prompt_tokens: int | None = None, beside_answers: int | None = None, patches: int | None = None
    ) -> ScheduledBatch | None:
        """The next step's batch, its pages allocated; None if there is nothing to do.

        prompt_tokens: at most so many of prompts (one at least); beside_answers: the same, where answers wait for it,
        and patches: so many of media then (one picture or segment at least), each taking from the tokens its share.
        """
        for request in list(self.running):  # answers first: their next token may need one page more
            if request.state is State.RUNNING and request.computed + 1 == len(request.token_ids):
                self._grow(request)
        self._admit()
        self._changed = False
        decodes = [r for r in self.running if self._decodes(r)]
        prefills = [r for r in self.running if not self._decodes(r)]
        budget = self.max_batch_tokens - len(decodes)
        limits = (prompt_tokens, beside_answers if decodes else None)
        budget = min(budget, *(max(1, limit) for limit in limits if limit is not None), budget)
        patches = patches if decodes else None
        shares, encoded = self._within(patches, prefills, self._shares(prefills, budget))
        if patches is not None and encoded:
            budget = max(1, budget - budget * encoded // patches)
            shares, encoded = self._within(patches, prefills, self._shares(prefills, budget))
        chunks = []
        for request, tokens in [*((r, 1) for r in decodes), *zip(prefills, shares)]:
            if tokens:
                start, end = request.computed, request.computed + tokens
                chunks.append(Chunk(request, start, end, samples=end == len(request.token_ids)))
        return ScheduledBatch(chunks, encoded) if chunks else None

    def following(self, batch: ScheduledBatch) -> ScheduledBatch | None:
        """The step after `batch`, before its tokens are known, its pages allocated: one more token of each answer that
        goes on for all that is known. None where another step than that would come, or somebody waits for this one."""
        if self.waiting and self._changed:
            return None
        if len(batch.sampling) != len(self.running) or len(batch.chunks) != len(self.running):
            return None
        going = [c for c in batch.chunks if c.request.generated + 1 < c.request.max_tokens]
        missing = [max(0, self._pages_for(c.end + 1) - len(c.request.pages)) for c in going]
        if not going or sum(missing) > self.pool.free:
            return None
        for chunk, pages in zip(going, missing):
            if pages:
                chunk.request.pages += self.pool.allocate(pages, after=chunk.request.pages[-1])
        return ScheduledBatch([Chunk(c.request, c.end, c.end + 1, samples=True) for c in going])

    def advance(self, batch: ScheduledBatch, tokens: list[int]) -> None:
        """Records that a batch was computed; `tokens` are the new ones of batch.sampling, in its order."""
        for request, token in zip(batch.sampling, tokens, strict=True):
            request.token_ids.append(token)
        for chunk in batch.chunks:  # last: an interrupt before it costs a recomputation only
            chunk.request.computed = chunk.end
            self._remember(chunk.request)

    def finish(self, request: Request, reason: str) -> None:
        """Ends a request at any stage and takes its pages back; one that has ended already stays as it is."""
        if request.state is State.FINISHED:
            return
        request.finish_reason, request.state = reason, State.FINISHED
        self._changed = True
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        self._free_pages(request)

    def reset(self) -> None:
        """All unfinished requests wait again, all pages are free: the way out of bookkeeping that broke off midway."""
        unfinished = {r for r in (*self.running, *self.waiting) if r.state is not State.FINISHED}
        self.waiting = sorted(unfinished, key=rank)
        self.running = []
        self.pool = PagePool(self.pool.num_pages)
        for request in self.waiting:
            request.state, request.pages, request.computed, request.remembered = State.WAITING, [], 0, 0

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _shares(self, prefills: list[Request], budget: int) -> list[int]:
        """How many tokens each prompt gets."""
        missing = [len(r.token_ids) - r.computed for r in prefills]
        shares = [0] * len(prefills)
        shortest = sorted(range(1, len(prefills)), key=missing.__getitem__)
        for i, most in [(0, -(-budget // 2)), *((i, budget) for i in shortest), (0, budget)] if prefills else []:
            tokens = min(missing[i] - shares[i], most, budget)
            shares[i] += tokens
            budget -= tokens
        return shares

    @staticmethod
    def _decodes(request: Request) -> bool:
        """Whether one token is all that is missing, and not one that shows a picture to be encoded."""
        last = request.computed
        return last + 1 == len(request.token_ids) and not (request.media and request.media.missing(last, last + 1))

    @staticmethod
    def _within(patches: int | None, prefills: list[Request], shares: list[int]) -> tuple[list[int], int]:
        """The shares, each cut where the media to encode would be too many, and the patches encoded then."""
        total, kept = 0, []
        for request, tokens in zip(prefills, shares):
            start = request.computed
            missing = request.media.missing(start, start + tokens) if request.media else {}
            for piece, position in missing.items():
                if patches is not None and total and total + piece.cost > patches:
                    tokens = position - start
                    break
                total += piece.cost
            kept.append(tokens)
        return kept, total

    def _admit(self) -> None:
        """Waiting requests enter while pages last, one for each that runs left over (or they would be out soon)."""
        under_way: set[bytes] | None = None  # keys of the blocks that running requests will compute
        for request in list(self.waiting):
            under_way = self._under_way(self.running) if under_way is None else under_way
            known = self._reusable_keys(request)
            shared = self.pool.find(known)
            if len(shared) < len(known) and known[len(shared)] in under_way:
                continue
            if not self._make_room(request, shared):
                return
            self._enter(request, shared)
            under_way |= self._under_way([request])

    def _under_way(self, requests: list[Request]) -> set[bytes]:
        size = self.page_size
        return {key for r in requests for key in r.keys[r.computed // size : len(r.token_ids) // size]}

    def _reusable_keys(self, request: Request) -> list[bytes]:
        """The keys of the blocks that need not be computed: the last known token always is, for its logits."""
        full = len(request.token_ids) // self.page_size
        keys = extend_keys(request, self.page_size, full)
        if request.params.prompt_logprobs is not None and len(request.prompt_logprobs) < len(request.prompt_ids):
            return []  # every token's logits are wanted
        return keys[: (len(request.token_ids) - 1) // self.page_size]

    def _make_room(self, request: Request, shared: list[int]) -> bool:
        """Whether there is room for a waiting request, taken from those of lower priority if that suffices."""
        victims = [r for r in self.running if r.priority < request.priority]  # by rank, the last one first to go
        others = len(self.running) - len(victims)
        held = Counter(page for r in victims for page in r.pages)
        kept = {page for page in shared if held[page] == self.pool.holders(page)}  # free, once the victims are gone
        gained = sum(count == self.pool.holders(page) for page, count in held.items())
        needed = self._pages_for(len(request.token_ids)) - len(shared) + len(kept)
        if others >= self.max_running or not self._enough(needed, self.pool.free + gained, others):
            return False
        while True:
            idle = sum(not self.pool.holders(page) for page in shared)
            needed = self._pages_for(len(request.token_ids)) - len(shared) + idle
            running = len(self.running)
            if running < self.max_running and self._enough(needed, self.pool.free, running):
                return True
            self._preempt(victims.pop())

    @staticmethod
    def _enough(needed: int, free: int, running: int) -> bool:
        return needed + running <= free or (not running and needed <= free)

    def _enter(self, request: Request, shared: list[int]) -> None:
        self.pool.retain(shared)
        after = shared[-1] if shared else None
        request.pages = shared  # at once: an interrupt must find what is held
        request.pages = shared + self.pool.allocate(self._pages_for(len(request.token_ids)) - len(shared), after)
        request.computed, request.remembered = len(shared) * self.page_size, len(shared)
        if not request.preemptions:
            request.cached = request.computed
        request.state = State.RUNNING
        insort(self.running, request, key=rank)
        self.waiting.remove(request)

    def _remember(self, request: Request) -> None:
        """Lets later requests find the blocks that are complete and computed."""
        blocks = request.computed // self.page_size
        keys = extend_keys(request, self.page_size, blocks)
        for block in range(request.remembered, blocks):
            self.pool.remember(request.pages[block], keys[block])
        request.remembered = blocks

    def _grow(self, request: Request) -> None:
        """Makes room for an answer's newest token, from the last request (itself, maybe) if no page is free."""
        missing = self._pages_for(len(request.token_ids)) - len(request.pages)
        while missing > self.pool.free and request.state is State.RUNNING:
            self._preempt(self.running[-1])
        if missing > 0 and request.state is State.RUNNING:
            request.pages += self.pool.allocate(missing, after=request.pages[-1])

    def _preempt(self, request: Request) -> None:
        self.preemptions += 1
        request.preemptions += 1
        insort(self.waiting, request, key=rank)
        self.running.remove(request)
        self._free_pages(request)
        request.state = State.WAITING

    def _free_pages(self, request: Request) -> None:
        pages, request.pages, request.computed, request.remembered = request.pages, [], 0, 0
        self.pool.release(pages)
