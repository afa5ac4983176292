"""Slowdown model of an engine: how many more requests it takes without slowing down by more than a factor.

The seconds that an engine takes for a token of each request are nearly linear in the number of requests: a step has a fixed part
(weights are read once) and one for each request. Both parts are fitted to what answers took, so nothing has to be known about
model or hardware. Pure.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

WEIGHT = 0.2
"""Of a new observation, beside those before it of about as many requests."""
FORGOTTEN_AFTER_S = 900.0
"""Age from which an observation says nothing any more: prompts may have another length."""
FEW = 2
"""Observations without which there is no line through them."""


@dataclass(slots=True)
class _Observed:
    """Mean of observations with about as many requests."""

    requests: float
    seconds_per_token: float
    at: float


class SlowdownModel:
    """What has been observed of one model."""

    def __init__(self) -> None:
        self._observed: dict[int, _Observed] = {}
        """By the logarithm of the number of requests."""

    def observe(self, requests: float, seconds: float, tokens: int, now: float) -> None:
        """An answer of `tokens` took `seconds` while so many requests ran, itself among them; `now`: monotonic seconds."""
        requests, time_per_token = max(1.0, requests), max(1e-9, seconds / max(1, tokens))
        before = self._observed.get(_bucket(requests))
        if before is None:
            self._observed[_bucket(requests)] = _Observed(requests, time_per_token, now)
            return
        before.requests += WEIGHT * (requests - before.requests)
        before.seconds_per_token += WEIGHT * (time_per_token - before.seconds_per_token)
        before.at = now

    def capacity(self, running: int, slowdown: float, now: float) -> float:
        """Requests that can run beside `running` others, with which tokens take at most `slowdown` times as long as without.

        Where little has been observed: twice as many as ever ran together, so that there is more to observe.
        """
        recent = (each for each in self._observed.values() if now - each.at < FORGOTTEN_AFTER_S)
        observed = sorted(recent, key=lambda each: each.requests)
        if len(observed) < FEW:
            return max(1.0, 2.0 * max((each.requests for each in observed), default=0.0) - running)
        # Fewer requests are not slower: a slow answer of few was one of a cold engine, or had a long prompt.
        counts = [each.requests for each in observed]
        times = list(itertools.accumulate((each.seconds_per_token for each in reversed(observed)), min))[::-1]
        # Least squares of the relative error, which is as large where few requests run as where many do.
        weights = [1.0 / time_per_token**2 for time_per_token in times]
        fits = list(zip(weights, counts, times, strict=True))
        mean_count = sum(weight * count for weight, count, _ in fits) / sum(weights)
        mean_time = sum(weight * time_per_token for weight, _, time_per_token in fits) / sum(weights)
        covariance = sum(
            weight * (count - mean_count) * (time_per_token - mean_time) for weight, count, time_per_token in fits
        )
        of_each = covariance / sum(weight * (count - mean_count) ** 2 for weight, count, _ in fits)
        if of_each <= 0.0:
            return math.inf
        fixed = max(0.0, mean_time - of_each * mean_count)
        return (slowdown - 1.0) * (fixed / of_each + max(1, running))


def _bucket(requests: float) -> int:
    return int(math.log2(requests))
