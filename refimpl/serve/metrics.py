"""Counters for Prometheus, in a registry of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from refimpl.decode.request import Reading, Stats

if TYPE_CHECKING:
    from refimpl.serve.engine import Engine

SECONDS_TO_FIRST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SECONDS_PER_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2)


class Metrics:
    """What is counted. Names follow Prometheus' conventions: `_total` is added to counters."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.requests = Counter("refimpl_requests", "Requests by endpoint and status", ("endpoint", "status"), registry=self.registry)
        self._read = self._counter("refimpl_prompt_tokens_read", "Tokens of prompts that were read")
        self._reused = self._counter("refimpl_prompt_tokens_reused", "Tokens of prompts that had been read before")
        self._generated = self._counter("refimpl_tokens_generated", "New tokens")
        self._drafted = self._counter("refimpl_tokens_drafted", "Tokens that were drafted")
        self._accepted = self._counter("refimpl_tokens_accepted", "Drafted tokens that were right")
        self.to_first = Histogram("refimpl_time_to_first_token_seconds", "From the request to its first token", registry=self.registry,
                                  buckets=SECONDS_TO_FIRST)
        self._per_token = Histogram("refimpl_time_per_token_seconds", "Between two tokens of an answer, its mean", registry=self.registry,
                                    buckets=SECONDS_PER_TOKEN)
        for name, text, value in (("refimpl_requests_running", "Requests that have a place", lambda: engine.n_running),
                                  ("refimpl_requests_waiting", "Requests that wait for a place", lambda: engine.n_waiting)):
            Gauge(name, text, registry=self.registry).set_function(value)

    def ended(self, reading: Reading, stats: Stats, n_generated: int):
        """An answer has ended, also one that its client gave up: of that there are the latest `reading` and `n_generated`, no `stats`."""
        self._read.inc(reading.n_read - reading.reused)
        self._reused.inc(reading.reused)
        self._generated.inc(max(n_generated, stats.n_generated))
        if stats.draft is not None:
            self._drafted.inc(stats.draft.n_proposed)
            self._accepted.inc(stats.draft.n_accepted)
        if stats.n_generated > 1:
            self._per_token.observe(stats.decode_seconds / (stats.n_generated - 1))

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, registry=self.registry)
