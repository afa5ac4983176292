"""Confirmation that a replica is lost: the directory has no heartbeat of it either.

A replica that this gateway alone cannot reach is alive, and writes the usage of its requests itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from tandem.gateway.replicas.fleet import Fleet
from tandem.gateway.replicas.upstream import Upstream
from tandem.routing.records import ReplicaRecord

LOST_WITHIN_S = 20.0
"""Seconds in which the directory calls a killed replica lost: 10 s of silence, with time for its message."""
CHECK_PERIOD_S = 0.5


class LossConfirmation:
    """Checks a replica's liveness route and the gateway's copy of the directory."""

    def __init__(self, upstream: Upstream, fleet: Fleet) -> None:
        self._upstream = upstream
        self._fleet = fleet
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """End all waits; replicas that are not confirmed lost by now count as alive."""
        self._stopping.set()

    async def call_if_lost(self, replica: ReplicaRecord, action: Callable[[], None]) -> None:
        """Call a function once a replica is known to be lost; never if it is not."""
        if await self.is_lost(replica):
            action()

    async def is_lost(self, replica: ReplicaRecord) -> bool:
        """Whether a replica does not answer and the directory calls it lost; waits up to `LOST_WITHIN_S` for the directory."""
        if await self._upstream.alive_status(replica) is not None:
            return False
        deadline = time.monotonic() + LOST_WITHIN_S
        while not self._fleet.is_lost(replica):
            if self._stopping.is_set() or time.monotonic() > deadline:
                return False
            try:
                await asyncio.wait_for(self._stopping.wait(), CHECK_PERIOD_S)
            except TimeoutError:
                continue
        return await self._upstream.alive_status(replica) is None
