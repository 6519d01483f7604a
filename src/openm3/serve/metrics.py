"""Counts and times in Prometheus' format. Names end in their unit; all begin with openm3_."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from openm3.engine.service import Unavailable

if TYPE_CHECKING:
    from openm3.engine.service import Service, Stream

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
NEXT = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)


class Metrics:
    """Everything that is counted, in a registry of its own. It is the engine service's meter."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made = {"registry": self.registry, "namespace": "openm3"}
        self._http = Counter("http_requests", "Requests answered, by route and status.", ["route", "status"], **made)
        self._seconds = Histogram("http_request_seconds", "From a request's first byte to its answer's last.",
                                  ["route"], **made)  # fmt: skip
        self._ended = Counter("answers", "Answers that have ended, by why.", ["reason"], **made)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts.", **made)
        self._cached = Counter("cached_prompt_tokens", "Tokens of prompts that the cache held already; over "
                               "openm3_prompt_tokens it is the hit rate.", **made)  # fmt: skip
        self._generated = Counter("generated_tokens", "Tokens generated, thinking included.", **made)
        self._first = Histogram("time_to_first_token_seconds", "From a request to its first token.", buckets=FIRST,
                                **made)  # fmt: skip
        self._next = Histogram("inter_token_seconds", "Between two tokens of an answer.", buckets=NEXT, **made)

    def watch(self, service: Service) -> None:
        """Adds the gauges that are read off the service when they are asked for."""
        ready = Gauge("ready", "1 if requests are taken.", registry=self.registry, namespace="openm3")
        ready.set_function(lambda: float(service.ready))
        self.registry.register(_Engine(service))

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request has been answered; status 0: the client was gone before."""
        self._http.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def tokens(self, seconds: float, count: int, first: bool) -> None:
        self._generated.inc(count)
        if first:
            self._first.observe(seconds)
        else:
            for _ in range(count):
                self._next.observe(seconds / count)

    def ended(self, reason: str, stream: Stream) -> None:
        prompt, cached, _, _ = stream.usage
        self._ended.labels(reason).inc()
        self._prompt.inc(prompt)
        self._cached.inc(cached)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Engine:
    """The engine's queue and pages as gauges; nothing while the model loads."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        try:
            stats = self._service.stats()
        except Unavailable:
            return
        for name, text, value in (
            ("openm3_requests_running", "Requests that hold pages.", stats.running),
            ("openm3_requests_waiting", "Requests in the queue.", stats.waiting),
            ("openm3_requests_under_way", "Requests taken and not ended.", self._service.under_way),
            ("openm3_pages", "Pages of the cache.", stats.pages),
            ("openm3_pages_free", "Pages that no running request needs.", stats.pages_free),
            ("openm3_pages_remembered", "Of the free pages, those kept for prompts that begin the same.",
             stats.pages_remembered),
        ):  # fmt: skip
            yield GaugeMetricFamily(name, text, value=value)
        text = "Times that a request lost its pages and was computed again."
        yield CounterMetricFamily("openm3_preemptions", text, value=stats.preemptions)
