"""Number of batch requests that may run beside interactive traffic. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.gateway.work.slowdown import SlowdownModel

QUIET_AFTER_S = 2.0
"""Seconds without interactive requests after which batches take all slots."""
UNLIMITED_AT_ONCE = 8
"""Requests of batches under way for a model without a limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLoad:
    """Requests of one model at one gateway."""

    limit: int | None
    """Requests that may be under way; None: no limit."""
    running: int
    """Requests under way, those of batches included."""
    waiting: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolLoad:
    """Load of the replicas that answer for a name."""

    base: str
    """Id of the base model."""
    load: ModelLoad


class BatchCapacity:
    """Decides how many requests of batches may be under way for one model."""

    def __init__(self, share: float, slowdown: float) -> None:
        """See `BatchesConfig`."""
        self._share = share
        self._slowdown = slowdown
        self._slowdown_model = SlowdownModel()
        self._interactive_at = -QUIET_AFTER_S

    def answered(self, running: float, seconds: float, tokens: int, now: float) -> None:
        """An answer of `tokens` took `seconds` while `running` requests of the model were under way."""
        self._slowdown_model.observe(running, seconds, tokens, now)

    def free(self, load: ModelLoad, in_flight: int, now: float) -> int:
        """Requests that may be sent now, of batches that have `in_flight` under way; `now`: monotonic seconds."""
        if load.running > in_flight or load.waiting:
            self._interactive_at = now
        if load.waiting:
            return 0
        if load.limit is None:
            # Engines without a limit queue what they are given.
            return max(0, UNLIMITED_AT_ONCE - in_flight)
        beside_clients = now - self._interactive_at < QUIET_AFTER_S
        own_limit = load.limit
        if beside_clients:
            clients = max(0, load.running - in_flight)
            own_limit = max(
                1, int(min(self._share * load.limit, self._slowdown_model.capacity(clients, self._slowdown, now)))
            )
        return max(0, min(own_limit - in_flight, load.limit - load.running))
