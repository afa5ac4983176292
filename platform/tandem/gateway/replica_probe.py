"""What a gateway does about replicas that count as lost: it asks the silent ones itself, and ends what waits for the others.

A heartbeat may fail to find the directory where the replica is well, and all its streams are. So silence is a reason to ask.
"""

from __future__ import annotations

import asyncio

import aiohttp

from tandem.gateway.connector import EngineConnector
from tandem.gateway.fleet import Fleet
from tandem.routing.records import ALIVE_PATH, TOKEN_HEADER, ReplicaRecord

ANSWER_S = 3.0
"""How long a silent replica has to say that it lives."""


class ReplicaProbe:
    """Asks each replica once at a time."""

    def __init__(self, session: aiohttp.ClientSession, connector: EngineConnector, fleet: Fleet) -> None:
        """`connector` is the pool of `session`; the fleet is told which of the silent take requests."""
        self._session = session
        self._connector = connector
        self._fleet = fleet
        self._running: dict[str, asyncio.Task[None]] = {}

    def start(self, replica: ReplicaRecord) -> None:
        """Look into the loss of a replica."""
        if replica.state == "stuck":
            # It says so itself.
            self._connector.abort_connections(replica.url)
        elif replica.id not in self._running:
            task = self._running[replica.id] = asyncio.create_task(self._check(replica))
            task.add_done_callback(lambda _: self._running.pop(replica.id))

    async def _check(self, replica: ReplicaRecord) -> None:
        status = await self._status(replica)
        self._fleet.confirm(replica, ready=status == 200)
        if status not in (200, 503):
            # What waits for it would wait for ever: so it is tried elsewhere, or ends with an error.
            self._connector.abort_connections(replica.url)

    async def _status(self, replica: ReplicaRecord) -> int | None:
        try:
            url, headers = replica.url + ALIVE_PATH, {TOKEN_HEADER: replica.token}
            async with asyncio.timeout(ANSWER_S), self._session.get(url, headers=headers) as answer:
                return answer.status
        except (TimeoutError, aiohttp.ClientError, OSError):
            return None
