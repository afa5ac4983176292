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
        self._answer_times_s: dict[int, float] = {}
        self._num_samples = 0
        self._decayed_sequences = 0.0
        self._decayed_seconds = 0.0
        self._measured_until: float | None = None

    @property
    def rate(self) -> float | None:
        """Sequences that end per second at the limit of sequences in flight; None: not known."""
        if self._num_samples < MIN_SAMPLES or self._decayed_seconds <= 0.0:
            return None
        return self._decayed_sequences / self._decayed_seconds

    def answer_time_s(self, kind: int) -> float:
        """90th percentile of the answer time of a kind, in seconds; 0: not known."""
        return self._answer_times_s.get(kind, 0.0)

    def scale(self, factor: float) -> None:
        """The limit of sequences in flight has changed by this factor."""
        self._decayed_sequences *= factor

    def waiting_began(self, now: float) -> None:
        """The queue is no longer empty: time counts for the rate."""
        if self._measured_until is None:
            self._measured_until = now

    def waiting_ended(self) -> None:
        """The queue is empty."""
        self._measured_until = None

    def ended(self, now: float, kind: int, took_s: float, *, complete: bool, sequences: int = 1) -> None:
        """A request of so many sequences has ended. An incomplete answer is known only to take longer."""
        estimate_s = self._answer_times_s.get(kind)
        if estimate_s is None:
            self._answer_times_s[kind] = took_s
        elif not complete and took_s > estimate_s / RISE:
            self._answer_times_s[kind] = estimate_s * RISE
        elif took_s > estimate_s:
            self._answer_times_s[kind] = min(took_s, estimate_s * RISE)
        elif complete:
            self._answer_times_s[kind] = estimate_s * FALL
        if self._measured_until is not None:
            elapsed_s = now - self._measured_until
            decay = math.exp(-elapsed_s / MEMORY_S)
            self._decayed_sequences = self._decayed_sequences * decay + sequences
            self._decayed_seconds = self._decayed_seconds * decay + elapsed_s
            self._num_samples += 1
            self._measured_until = now
