"""The engine: scheduler, runner and sampler, one step at a time on the caller's thread.

An exception inside a step, Ctrl-C included, leaves every request as if the step had not been, at worst to be computed
again: whoever asked for it cancels it, or steps on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from openm3.engine.pages import PagePool
from openm3.engine.request import Request, State
from openm3.engine.sampler import sample
from openm3.engine.scheduler import ScheduledBatch, Scheduler


class BatchRunner(Protocol):
    """What the engine asks of a runner (`openm3.engine.runner.Runner`)."""

    def run(self, batch: ScheduledBatch) -> Tensor:
        """Computes the batch's tokens into their pages; float32 logits [len(batch.sampling), V]."""


class Engine:
    """`add` requests, `step` until they are finished, `cancel` at any time."""

    def __init__(self, runner: BatchRunner, *, num_pages: int, page_size: int, max_batch_tokens: int = 2048) -> None:
        self.runner = runner
        self.scheduler = Scheduler(PagePool(num_pages), page_size, max_batch_tokens=max_batch_tokens)

    def add(self, request: Request) -> None:
        """Queues a request; RequestError if it can never fit the cache."""
        self.scheduler.add(request)

    def cancel(self, request: Request) -> None:
        """Ends a request and frees its pages; nothing happens if it has ended already."""
        with self._bookkeeping():
            self._finish(request, "cancelled")

    def step(self) -> bool:
        """Computes one batch and gives each of its answers a token. False if there was nothing to do."""
        with self._bookkeeping():
            batch = self.scheduler.schedule()
        if batch is None:
            return False
        logits = self.runner.run(batch)
        sampling = batch.sampling
        tokens = []
        if sampling:
            tokens = sample(
                logits, [r.params for r in sampling], [r.seed for r in sampling], [r.generated for r in sampling]
            )
        with self._bookkeeping():
            self.scheduler.advance(batch, tokens)
            for request, token in zip(sampling, tokens):
                self._deliver(request, token)
        return True

    @contextmanager
    def _bookkeeping(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.scheduler.reset()
            raise

    def _deliver(self, request: Request, token: int) -> None:
        """Adds a token to its request's text, and ends the request if that was its last."""
        if token in request.eos_ids:
            request.output.finish()
            self._finish(request, "stop")
        elif request.output.push(token):
            self._finish(request, "stop")
        elif request.generated >= request.max_tokens:
            self._finish(request, "stop" if request.output.finish() else "length")

    def _finish(self, request: Request, reason: str) -> None:
        if request.state is not State.FINISHED:
            self.scheduler.finish(request, reason)
            request.media = None
