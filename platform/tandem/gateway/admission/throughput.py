"""How fast a model's answers end at one gateway, and how long they take. Pure.

The rate is measured while requests wait: only then does it say what is possible. How long answers take is kept by their
kind, as the time that nine of ten need at most: a request that is started with less left keeps an engine busy for nothing.
"""

from __future__ import annotations

import math

MEMORY_S = 10.0
"""Time of waiting after which what was measured before counts for a third."""
MIN_SAMPLES = 4
"""Ends that a rate is made of, at least."""
RISE, FALL = 1.18, 0.98
"""Steps by which the time of a kind follows what is seen: it rests where one of about ten takes longer."""


class ThroughputEstimator:
    """What was seen of the answers of one model."""

    def __init__(self) -> None:
        self._takes_s: dict[int, float] = {}
        self._seen = 0
        self._ended = 0.0
        self._seconds = 0.0
        self._since: float | None = None

    @property
    def rate(self) -> float | None:
        """Requests that end in a second when as many are in flight as may be; None: not known."""
        return self._ended / self._seconds if self._seen >= MIN_SAMPLES and self._seconds > 0.0 else None

    def answer_time_s(self, kind: int) -> float:
        """Seconds that nine of ten answers of a kind take at most; 0: not known."""
        return self._takes_s.get(kind, 0.0)

    def scale(self, factor: float) -> None:
        """There is so much more room for requests than before."""
        self._ended *= factor

    def waiting_began(self, now: float) -> None:
        """From the first that waits on, time counts."""
        if self._since is None:
            self._since = now

    def waiting_ended(self) -> None:
        """The last has started or is gone."""
        self._since = None

    def ended(self, now: float, kind: int, took_s: float, *, complete: bool) -> None:
        """A request is over. Of one that has no whole answer it is only known that it would have taken longer."""
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
            self._ended = self._ended * kept + 1.0
            self._seconds = self._seconds * kept + passed
            self._seen += 1
            self._since = now
