"""Retry policy: time until the next attempt, by exponential back-off with jitter. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.jobs.work.states import Action


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """Delays between attempts."""

    first_s: float = 5.0
    """Delay after the first failure, in seconds; it doubles with each further one."""
    longest_s: float = 600.0
    jitter: float = 0.5
    """Share of the delay, 0 to 1, that is drawn at random, so that work which failed together does not start together."""

    def delay_s(self, failures: int, draw: float) -> float:
        """Seconds until the next attempt after `failures` (from 1) failures in a row; `draw` is uniform in [0, 1)."""
        # 2.0 ** 1024 overflows.
        whole = min(self.longest_s, self.first_s * 2.0 ** min(failures - 1, 64))
        return whole * (1.0 - self.jitter * draw)


JOB_RETRIES = RetryPolicy()
ITEM_RETRIES = RetryPolicy(first_s=1.0, longest_s=60.0)


def after_failure(failures: int, max_attempts: int, *, retryable: bool) -> Action:
    """The action that follows a failed attempt; `failures` counts it."""
    if not retryable:
        return Action.FAIL
    return Action.RETRY if failures < max_attempts else Action.GIVE_UP
