"""Throughput estimator: completion rate and answer times of a model at one gateway. Pure.

The rate is measured only while requests wait, since only then it is the capacity. Answer times are the 90th percentile for each
kind of request: one that starts with less time left would keep an engine busy for nothing.
"""

from __future__ import annotations

import math

MEMORY_S = 10.0
"""Seconds of queueing after which older measurements count 1/e."""
MIN_SAMPLES = 4
"""Completions needed for a rate."""
RISE, FALL = 1.18, 0.98
"""Factors by which the answer time of a kind follows observations: in balance where one of about ten takes longer."""


class ThroughputEstimator:
    """Estimates for one model."""

    def __init__(self) -> None:
        self._takes_s: dict[int, float] = {}
        self._seen = 0
        self._ended = 0.0
        self._seconds = 0.0
        self._since: float | None = None

    @property
    def rate(self) -> float | None:
        """Sequences that end per second at the limit of sequences in flight; None: not known."""
        return self._ended / self._seconds if self._seen >= MIN_SAMPLES and self._seconds > 0.0 else None

    def answer_time_s(self, kind: int) -> float:
        """90th percentile of the answer time of a kind, in seconds; 0: not known."""
        return self._takes_s.get(kind, 0.0)

    def scale(self, factor: float) -> None:
        """The limit of sequences in flight has changed by this factor."""
        self._ended *= factor

    def waiting_began(self, now: float) -> None:
        """The queue is no longer empty: time counts for the rate."""
        if self._since is None:
            self._since = now

    def waiting_ended(self) -> None:
        """The queue is empty."""
        self._since = None

    def ended(self, now: float, kind: int, took_s: float, *, complete: bool, sequences: int = 1) -> None:
        """A request of so many sequences has ended. An incomplete answer is known only to take longer."""
        known = self._takes_s.get(kind)
        if known is None:
            self._takes_s[kind] = took_s
        elif not complete and took_s > known / RISE:
            self._takes_s[kind] = known * RISE
        elif took_s > known:
            self._takes_s[kind] = min(took_s, known * RISE)
        elif complete:
            self._takes_s[kind] = known * FALL
        if self._since is not None:
            passed = now - self._since
            kept = math.exp(-passed / MEMORY_S)
            self._ended = self._ended * kept + sequences
            self._seconds = self._seconds * kept + passed
            self._seen += 1
            self._since = now
