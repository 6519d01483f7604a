"""The model on a thread of its own: it loads while the first line is typed, and an answer under way can be stopped.

One thread does all of the model's work, one job after the other; the terminal's thread only takes events from queues.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Job:
    """One answer: `poll` gives its next event, None while there is none yet; `stop` ends it early."""

    def __init__(self, start: Callable[[Any], Iterator[Any]]) -> None:
        self._start = start
        self._events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self.done = False

    def poll(self, seconds: float) -> Any | None:
        """The next event, or None after `seconds` without one or at the end (`done`); raises what the model raised."""
        if self.done:
            return None
        try:
            kind, value = self._events.get(timeout=seconds)
        except queue.Empty:
            return None
        if kind == "event":
            return value
        self.done = True
        if value is not None:
            raise value
        return None

    def stop(self) -> None:
        self._stopped.set()

    def run(self, model: Any) -> None:
        error = None
        try:
            if not self._stopped.is_set():
                stream = self._start(model)
                for event in stream:
                    self._events.put(("event", event))
                    if self._stopped.is_set():
                        stream.close()  # cancels the request and frees its pages
                        break
        except BaseException as caught:
            error = caught
        self._events.put(("end", error))


class Worker:
    """Loads a model at once, in the background, and runs jobs on it. `on_loaded` is called in the background too."""

    def __init__(self, load: Callable[[], Any], on_loaded: Callable[[Any | None], None]) -> None:
        self.model: Any | None = None
        self.error: BaseException | None = None
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(load, on_loaded), daemon=True, name="openm3-model")
        self._thread.start()

    @property
    def loading(self) -> bool:
        return self.model is None and self.error is None

    def submit(self, start: Callable[[Any], Iterator[Any]]) -> Job:
        """Queues an answer: `start(model)` is called in the background and gives the iterator of its events."""
        job = Job(start)
        self._jobs.put(job)
        return job

    def close(self) -> bool:
        """Lets the thread end after its present job; False if it is still busy after a moment."""
        self._jobs.put(None)
        self._thread.join(timeout=1.0)
        return not self._thread.is_alive()

    def _run(self, load: Callable[[], Any], on_loaded: Callable[[Any | None], None]) -> None:
        try:
            self.model = load()
        except BaseException as caught:
            self.error = caught
        on_loaded(self.model)
        while self.model is not None and (job := self._jobs.get()) is not None:
            job.run(self.model)
