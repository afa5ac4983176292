"""Latency added by the gateway to a request, for a response header and a metric.

It is the time from the last byte of the client's request to its last byte on the way to the engine, plus the time from the first
byte of the engine's answer to its head on the way to the client. Delays of the event loop before it reads a byte are not
included; `bench/serving/gateway_latency.py` measures the whole from outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

HEADER = b"server-timing"
"""W3C Server-Timing in milliseconds: `gateway;dur=0.41, engine;dur=51.20`."""

RecordLatency = Callable[[str, float], None]
"""Takes a route and the milliseconds added to one request."""


def ignore_latency(route: str, added_ms: float) -> None:
    """A RecordLatency that does nothing."""


@dataclass(slots=True)
class Stopwatch:
    """Times of one request, in seconds of `time.perf_counter`."""

    received: float = field(default_factory=time.perf_counter)
    sent: float = 0.0
    answered: float = 0.0

    def mark_sent(self) -> None:
        """The request has been written to the engine."""
        self.sent = time.perf_counter()

    def split_ms(self) -> tuple[float, float]:
        """Milliseconds spent in the gateway and in the engine until now."""
        # An engine may refuse a request before it has read all of it.
        engine = self.answered - self.sent if 0.0 < self.sent < self.answered else 0.0
        return 1000 * (time.perf_counter() - self.received - engine), 1000 * engine


def header(gateway_ms: float, engine_ms: float) -> bytes:
    """The value of `HEADER`."""
    return f"gateway;dur={gateway_ms:.3f}, engine;dur={engine_ms:.3f}".encode()


def parse(value: str) -> dict[str, float]:
    """Milliseconds by name, from the value of `HEADER`."""
    parts = (part.strip().partition(";dur=") for part in value.split(","))
    return {name: float(duration) for name, _, duration in parts if duration}
