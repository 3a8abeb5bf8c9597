"""What the door counts of itself, in Prometheus' text format: requests, times, pictures and tokens."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """One process's counts. Labels are route templates and statuses, never what a client made up."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "nexusgen_requests",
            "Requests answered; 499 is a client that left first",
            ("route", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "nexusgen_request_seconds",
            "From arrival to the last byte",
            ("route",),
            registry=self.registry,
            buckets=_SECONDS,
        )
        self.first_event = Histogram(
            "nexusgen_first_event_seconds",
            "From arrival to the model's first word or picture",
            ("route",),
            registry=self.registry,
            buckets=_SECONDS,
        )
        self.in_flight = Gauge("nexusgen_requests_in_flight", "Requests being answered", registry=self.registry)
        self.pictures = Counter("nexusgen_pictures", "Pictures drawn", ("route",), registry=self.registry)
        self.tokens = Counter(
            "nexusgen_tokens", "Tokens read (prompt) and written (completion)", ("kind",), registry=self.registry
        )

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
