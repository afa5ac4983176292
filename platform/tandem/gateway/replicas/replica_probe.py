"""Liveness probe of lost replicas: silent ones are asked directly, connections to dead or stuck ones are broken.

Heartbeats may fail to reach the directory while the replica and all its streams are well. So the gateway asks a silent replica
itself before it breaks the connections to it.
"""

from __future__ import annotations

import asyncio

from tandem.gateway.replicas.fleet import Fleet
from tandem.gateway.replicas.upstream import Upstream
from tandem.routing.records import ReplicaRecord


class ReplicaProbe:
    """Probes each lost replica, once at a time."""

    def __init__(self, upstream: Upstream, fleet: Fleet) -> None:
        """`fleet` gets the results for silent replicas."""
        self._upstream = upstream
        self._fleet = fleet
        self._running: dict[str, asyncio.Task[None]] = {}

    def start(self, replica: ReplicaRecord) -> None:
        """Probe a lost replica in the background."""
        if replica.state == "stuck":
            # The replica itself has reported that its engine makes no progress.
            self._upstream.abort_connections(replica)
        elif replica.id not in self._running:
            task = self._running[replica.id] = asyncio.create_task(self._check(replica))
            task.add_done_callback(lambda _: self._running.pop(replica.id))

    async def is_ready(self, replica: ReplicaRecord) -> bool:
        """Whether a replica answers that it takes requests."""
        return await self._upstream.alive_status(replica) == 200

    async def _check(self, replica: ReplicaRecord) -> None:
        status = await self._upstream.alive_status(replica)
        self._fleet.confirm(replica, ready=status == 200)
        if status not in (200, 503):
            # Requests on these connections would never end: they are retried elsewhere, or end with an error.
            self._upstream.abort_connections(replica)
