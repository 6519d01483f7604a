"""The engine: scheduler, runner and sampler, one step at a time on the caller's thread.

An exception inside a step fails only the requests that raise it: the batch is computed again in halves, down to the
one request at fault, which ends with `error` set; the others never notice. Where memory ran out, a single prompt's
chunk is halved too, and prompts get smaller chunks for a while. An interrupt (Ctrl-C) leaves every request as if the
step had not been, at worst to be computed again: whoever asked for it cancels it, or steps on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from openm3.engine.pages import PagePool
from openm3.engine.request import Request, State, TokenLogprobs
from openm3.engine.sampler import adjust, logprobs_of, sample
from openm3.engine.scheduler import Chunk, ScheduledBatch, Scheduler
from openm3.engine.threads import one_thread
from openm3.msa.plan import to_device

if TYPE_CHECKING:
    from openm3.engine.guide import Guide

TOKEN_DELAY = 0.25  # seconds that a step with prompts may take where answers wait for it
FIRST_PROMPT_TOKENS, FIRST_PATCHES = 256, 1024  # of such a step, before the first measurement
ONE_THREAD_LOGITS = 1 << 22  # up to so many on a CPU, one thread draws the tokens: some 20 ms
RECOVERY_STEPS = 100  # steps without running out of memory after which prompts get chunks twice as large again


class BatchRunner(Protocol):
    """What the engine asks of a runner (`openm3.engine.runner.Runner`)."""

    def run(self, batch: ScheduledBatch, tokens: Tensor | None = None) -> Tensor:
        """Computes the batch's tokens into their pages; float32 logits [len(batch.sampling), V].

        tokens int64 [chunks]: the one token of each chunk, where its request does not hold it yet."""


class Engine:
    """`add` requests, `step` until they are finished, `cancel` at any time.

    guides: makes the guide of a request with a grammar or a thinking budget.
    token_delay: about how many seconds a running answer waits at most for the prompts computed, and the pictures
    encoded, beside it (longer for a single picture that takes longer).
    ahead: the next step of answers is given to the device before the tokens of this one are known here, so that it
    computes while they become text and the step is scheduled: worth it on a GPU.
    """

    def __init__(
        self,
        runner: BatchRunner,
        *,
        num_pages: int,
        page_size: int,
        max_batch_tokens: int = 2048,
        guides: Callable[[Request], Guide | None] | None = None,
        token_delay: float = TOKEN_DELAY,
        ahead: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner = runner
        self.scheduler = Scheduler(PagePool(num_pages), page_size, max_batch_tokens=max_batch_tokens)
        self.token_delay, self.ahead = token_delay, ahead
        self._begun: tuple[ScheduledBatch, Tensor] | None = None  # the step that was given ahead, its logits
        self._guides, self._clock = guides, clock
        self._prompt_seconds: float | None = None  # that a token of a prompt takes
        self._patch_seconds: float | None = None  # that a patch of a picture takes
        self._memory_limit, self._good_steps = max_batch_tokens, 0

    def add(self, request: Request) -> None:
        """Queues a request; RequestError if it can never fit the cache, or its grammar cannot be enforced."""
        if request.guide is None and self._guides is not None:
            request.guide = self._guides(request)
        self.scheduler.add(request)

    def cancel(self, request: Request) -> None:
        """Ends a request and frees its pages; nothing happens if it has ended already."""
        with self._bookkeeping():
            self._finish(request, "cancelled")

    def step(self) -> bool:
        """Computes one batch and gives each of its answers a token. False if there was nothing to do."""
        with self._bookkeeping():
            for request in self.scheduler.expired(self._clock()):
                self._finish(request, "deadline")
            batch, logits = self._take_begun()
            batch = batch or self.scheduler.schedule(self._memory_limit, *self._beside_answers())
        if batch is None:
            return False
        started = self._clock()
        try:
            self._compute(batch, logits)
        except BaseException:
            self._begun = None  # it was given tokens that nobody gets
            raise
        self._good_steps += 1
        if self._good_steps == RECOVERY_STEPS:
            self._memory_limit, self._good_steps = min(2 * self._memory_limit, self.scheduler.max_batch_tokens), 0
        self._measure(batch, self._clock() - started)
        return True

    @contextmanager
    def _bookkeeping(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._begun = None
            self.scheduler.reset()
            raise

    def _beside_answers(self) -> tuple[int, int]:
        """Tokens of prompts, or patches of media, that a step may have where answers wait for it."""
        prompt, patch = self._prompt_seconds, self._patch_seconds
        tokens = FIRST_PROMPT_TOKENS if prompt is None else max(16, int(self.token_delay / prompt))
        return tokens, FIRST_PATCHES if patch is None else max(1, int(self.token_delay / patch))

    def _measure(self, batch: ScheduledBatch, seconds: float) -> None:
        prompt = sum(chunk.tokens for chunk in batch.chunks if chunk.tokens > 1)
        if batch.patches:
            seconds -= prompt * (self._prompt_seconds or 0.0)
            self._patch_seconds = _smoothed(self._patch_seconds, seconds / batch.patches)
        elif prompt >= 16:
            self._prompt_seconds = _smoothed(self._prompt_seconds, seconds / prompt)

    def _take_begun(self) -> tuple[ScheduledBatch | None, Tensor | None]:
        """The step that was given ahead, of those that did not end meanwhile, and its logits."""
        begun, self._begun = self._begun, None
        if begun is None:
            return None, None
        (batch, logits), alive = begun, [c.request.state is State.RUNNING for c in begun[0].chunks]
        if not all(alive):
            batch = ScheduledBatch([chunk for chunk, lives in zip(batch.chunks, alive) if lives])
            logits = logits[to_device(torch.tensor(alive).nonzero()[:, 0], logits.device)]
        return (batch, logits) if batch.chunks else (None, None)

    def _give_ahead(self, batch: ScheduledBatch, tokens: Tensor, vocab: int) -> None:
        """Begins the step after `batch`, whose tokens int64 [len(batch.sampling)] are known to the device only."""
        with self._bookkeeping():
            following = self.scheduler.following(batch)
        if following is None:
            return
        tokens = tokens.clamp(max=vocab - 1)  # beyond it where logits are no numbers
        if len(following.chunks) < len(tokens):
            going = {chunk.request for chunk in following.chunks}
            rows = torch.tensor([row for row, request in enumerate(batch.sampling) if request in going])
            tokens = tokens[to_device(rows, tokens.device)]
        try:
            self._begun = following, self.runner.run(following, tokens)
        except Exception as error:  # what fails here fails again, in a step of its own
            if is_out_of_memory(error):
                _free_memory(error)

    def _compute(self, batch: ScheduledBatch, logits: Tensor | None = None) -> None:
        try:
            logits = self.runner.run(batch) if logits is None else logits
            with one_thread(logits.device.type == "cpu" and logits.numel() <= ONE_THREAD_LOGITS):
                failed, raw = self._adjust(batch.sampling, logits)
                drawn = self._draw(batch.sampling, logits)
                read = _on_its_way(drawn)
                if self.ahead and not failed and not raw:  # the step ahead may overwrite these logits
                    self._give_ahead(batch, drawn, logits.shape[-1])
                tokens = read()
                records = self._records(batch.sampling, tokens, raw)
        except Exception as error:
            failure = error
        else:
            vocab = logits.shape[-1] if tokens else 0
            for request, token in zip(batch.sampling, tokens):
                if token >= vocab:  # where the search for the drawn point ends among numbers that are none
                    failed.setdefault(request, ArithmeticError("the model's logits are not numbers"))
            self._advance(batch, tokens, records, failed)
            return
        self._retry(batch, failure)

    def _retry(self, batch: ScheduledBatch, error: Exception) -> None:
        """Computes a batch that failed in two parts, or fails the request that it is about."""
        chunks, no_memory = batch.chunks, is_out_of_memory(error)
        self._begun = None  # it was given tokens that are now drawn again
        if no_memory:
            _free_memory(error)
            self._memory_limit, self._good_steps = max(self.scheduler.page_size, batch.tokens // 2), 0
        if len(chunks) > 1:
            parts = [chunks[: len(chunks) // 2], chunks[len(chunks) // 2 :]]
        elif no_memory and chunks[0].tokens > self.scheduler.page_size:
            [chunk] = chunks
            middle = chunk.start + chunk.tokens // 2
            parts = [[Chunk(chunk.request, chunk.start, middle, samples=False)],
                     [Chunk(chunk.request, middle, chunk.end, chunk.samples)]]  # fmt: skip
        else:
            with self._bookkeeping():
                self._fail(chunks[0].request, error)
            return
        for part in parts:
            if alive := [chunk for chunk in part if chunk.request.state is State.RUNNING]:
                self._compute(ScheduledBatch(alive))

    @torch.inference_mode()  # what the runner gives may not be written to outside of it
    def _adjust(self, sampling: list[Request], logits: Tensor) -> tuple[dict[Request, Exception], dict[int, Tensor]]:
        """Biases, penalties and grammars, in place; (what went wrong with whom, the rows as they were that log-
        probabilities are wanted of)."""
        failed: dict[Request, Exception] = {}
        raw: dict[int, Tensor] = {}
        for row, request in enumerate(sampling):
            params = request.params
            changes = bool(params.logit_bias) or params.penalizes or request.guide is not None
            if params.logprobs is not None:
                raw[row] = logits[row].clone() if changes else logits[row]
            if not changes:
                continue
            try:
                if request.guide is not None:
                    request.guide.apply(logits[row], request.output_ids)
                adjust(logits, row, request)
            except Exception as error:
                failed[request] = error
                logits[row] = 0.0
        return failed, raw

    @staticmethod
    def _draw(sampling: list[Request], logits: Tensor) -> Tensor:
        """The next tokens int64 [n], on the device."""
        params, seeds = [r.params for r in sampling], [r.seed for r in sampling]
        return sample(logits, params, seeds, [r.generated for r in sampling])

    @staticmethod
    def _records(sampling: list[Request], tokens: list[int], raw: dict[int, Tensor]) -> dict[Request, TokenLogprobs]:
        """The log-probabilities of those who want them."""
        if not raw:
            return {}
        wanted = [(sampling[row], sampling[row].params.logprobs) for row in raw]
        found = logprobs_of(torch.stack(list(raw.values())), [tokens[row] for row in raw], max(n for _, n in wanted))
        return {r: TokenLogprobs(x.token, x.logprob, x.top[:n]) for (r, n), x in zip(wanted, found)}

    def _advance(
        self, batch: ScheduledBatch, tokens: list[int], records: dict[Request, TokenLogprobs],
        failed: dict[Request, Exception],
    ) -> None:  # fmt: skip
        with self._bookkeeping():
            for request, error in failed.items():
                self._fail(request, error)
            new = {r: token for r, token in zip(batch.sampling, tokens) if r not in failed}
            batch = ScheduledBatch([chunk for chunk in batch.chunks if chunk.request not in failed])
            for request in records.keys() & new.keys():
                request.logprobs[request.generated :] = [records[request]]
            self.scheduler.advance(batch, list(new.values()))
            for request, token in new.items():
                try:
                    self._deliver(request, token)
                except Exception as error:
                    self._fail(request, error)

    def _deliver(self, request: Request, token: int) -> None:
        """Adds a token to its request's text, and ends the request if that was its last."""
        if token in request.eos_ids or token in request.params.stop_token_ids:
            request.output.finish()
            self._finish(request, "stop")
        elif request.output.push(token):
            self._finish(request, "stop")
        elif request.guide is not None and request.guide.ended(request.output_ids):
            request.output.finish()
            self._finish(request, "stop")
        elif request.generated >= request.max_tokens:
            self._finish(request, "stop" if request.output.finish() else "length")

    def _fail(self, request: Request, error: Exception) -> None:
        request.error = error
        self._finish(request, "error")

    def _finish(self, request: Request, reason: str) -> None:
        if request.state is not State.FINISHED:
            self.scheduler.finish(request, reason)
            request.media = request.history = request.guide = None


def _smoothed(before: float | None, now: float) -> float:
    return max(1e-9, now if before is None else 0.7 * before + 0.3 * now)


def _on_its_way(tokens: Tensor) -> Callable[[], list[int]]:
    """Begins to bring tokens to the host; what is called waits for them, and for nothing that the device does after."""
    if not tokens.is_cuda:
        return tokens.tolist
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    there = torch.cuda.Event()
    there.record(torch.cuda.current_stream(tokens.device))

    def read() -> list[int]:
        there.synchronize()
        return host.tolist()

    return read


def _free_memory(error: Exception) -> None:
    error.__traceback__ = None  # it holds the step's tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, on any device, or Python could not get memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and ("out of memory" in str(error) or "can't allocate memory" in str(error))
