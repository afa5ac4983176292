"""Metrics of an app through Ray, which exports them to Prometheus on each node."""

from __future__ import annotations

from collections.abc import Callable

from ray.util.metrics import Counter, Gauge, Histogram

ADDED_MS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 13.0, 25.0, 50.0, 100.0, 250.0, 1000.0)


def latency_histogram() -> Callable[[str, float], None]:
    """A function that records the milliseconds added to one request, in a histogram by route."""
    histogram = Histogram(
        "tandem_gateway_added_ms",
        description="Milliseconds that a gateway adds to a request, up to the first byte of its answer.",
        boundaries=list(ADDED_MS),
        tag_keys=("route",),
    )

    def observe(route: str, added_ms: float) -> None:
        histogram.observe(added_ms, {"route": route})

    return observe


class RayQueueMetrics:
    """Running, waiting and refused requests of a gateway, by model."""

    def __init__(self) -> None:
        self._waiting = Gauge(
            "tandem_gateway_waiting_requests",
            description="Requests that wait at a gateway, for room at the engines or for a replica.",
            tag_keys=("model",),
        )
        self._running = Gauge(
            "tandem_gateway_running_requests",
            description="Requests of a gateway that are in flight at the engines.",
            tag_keys=("model",),
        )
        self._refused = Counter(
            "tandem_gateway_refused_requests",
            description="Requests that were not answered, by the reason: full, displaced, deadline_unreachable, expired, "
            "unserved, late.",
            tag_keys=("model", "reason"),
        )

    def load(self, model: str, running: int, waiting: int) -> None:
        """A model's requests in flight and waiting, now."""
        self._running.set(running, {"model": model})
        self._waiting.set(waiting, {"model": model})

    def refused(self, model: str, outcome: str) -> None:
        """A request was refused, or missed its deadline."""
        self._refused.inc(1, {"model": model, "reason": outcome})
