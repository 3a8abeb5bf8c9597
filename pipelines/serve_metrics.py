"""What the replicas behind the door have done, in Prometheus' text format.

Sums and counts, of which a query makes rates and means: queue time is `queue_seconds_total / requests_total`, the mean
batch `batch_rows_total / steps_total`, speed the rate of `units_total` (tokens and pictures).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

_LABELS = ("deployment", "pid")


def replica_metrics(num_inside: int, stats: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Text of what `Replica.stats` says, by deployment; `num_inside` are the requests that the door has let in."""
    registry = CollectorRegistry()

    def gauge(name: str, what: str, labels: Sequence[str] = _LABELS) -> Gauge:
        return Gauge(f"nexusgen_{name}", what, labels, registry=registry)

    def counter(name: str, what: str, labels: Sequence[str] = _LABELS) -> Counter:
        return Counter(f"nexusgen_engine_{name}", what, labels, registry=registry)

    gauge("requests_inside", "Requests that this door has let in and not answered yet", ()).set(num_inside)
    present = gauge("engine_requests_present", "Requests that wait for a step or take part in them")
    waiting = gauge("engine_requests_waiting", "Requests that wait for a place in a batch")
    weights = gauge("weight_bytes", "Memory of the weights of all versions, what they share counted once")
    counters = {
        "requests": counter("requests", "Requests that have taken part in steps"),
        "steps": counter("steps", "Steps made"),
        "step_s": counter("step_seconds", "Time in steps"),
        "batch_sum": counter("batch_rows", "Requests that took part in steps, summed over steps"),
        "queue_s": counter("queue_seconds", "Time from arrival to a place in a batch, summed over requests"),
        "first_events": counter("first_events", "Requests that had a first word or picture"),
        "first_event_s": counter("first_event_seconds", "Time from arrival to that, summed over requests"),
    }
    units = counter("units", "What was made or read", (*_LABELS, "unit"))
    for deployment, replicas in stats.items():
        for replica in replicas:
            labels = (deployment, str(replica["pid"]))
            present.labels(*labels).set(replica["requests"])
            waiting.labels(*labels).set(replica["waiting"])
            weights.labels(*labels).set(replica["weight_bytes"])
            for loop in replica["loops"]:
                for name, one in counters.items():
                    one.labels(*labels).inc(loop[name])
                for unit, count in loop["units"].items():
                    units.labels(*labels, unit).inc(count)
    return generate_latest(registry).decode()
