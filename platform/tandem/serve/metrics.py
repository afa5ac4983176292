"""The app's own metrics, by Ray's: what Ray exports for Prometheus on each node."""

from __future__ import annotations

from collections.abc import Callable

from ray.util.metrics import Histogram

ADDED_MS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 13.0, 25.0, 50.0, 100.0, 250.0, 1000.0)


def added_latency() -> Callable[[str, float], None]:
    """Takes a route and the milliseconds that a gateway added to one request, into a histogram by route."""
    histogram = Histogram(
        "tandem_gateway_added_ms",
        description="Milliseconds that a gateway adds to a request, up to the first byte of its answer.",
        boundaries=list(ADDED_MS),
        tag_keys=("route",),
    )

    def observe(route: str, added_ms: float) -> None:
        histogram.observe(added_ms, {"route": route})

    return observe
