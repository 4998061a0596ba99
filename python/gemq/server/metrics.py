"""Figures of a server in Prometheus' form."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gemq.server.engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server."""

    def __init__(self, engine: Engine):
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("gemq_requests", "Requests by how they ended.", ["outcome"], registry=registry)
        self.prompt = Counter("gemq_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.cached = Counter("gemq_cached_prompt_tokens", "Of these, read with an earlier prompt.", registry=registry)
        self.new = Counter("gemq_generated_tokens", "New tokens.", registry=registry)
        self.first = Histogram("gemq_time_to_first_token_seconds", "Up to the first token.", buckets=_SECONDS,
                               registry=registry)
        self.whole = Histogram("gemq_request_seconds", "Up to the last token.", buckets=_SECONDS, registry=registry)
        running = Gauge("gemq_running_requests", "Jobs that are decoded.", registry=registry)
        running.set_function(lambda: len(engine.running))
        waiting = Gauge("gemq_waiting_requests", "Jobs that wait or whose prompt is read.", registry=registry)
        waiting.set_function(lambda: len(engine.waiting) + (engine.reading is not None))

    def text(self) -> bytes:
        """All of them, as ``/metrics`` gives them."""
        return generate_latest(self.registry)
