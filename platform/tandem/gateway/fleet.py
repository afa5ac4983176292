"""The replicas as this gateway sees them: the directory's snapshot, plus what it has just found out by itself."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import replace

from tandem.serve.records import ReplicaRecord, Snapshot
from tandem.serve.router import choose

Watch = Callable[[int], Awaitable[Snapshot]]
"""Gives the directory's snapshot: at once if it is not of the version given, else when it changes or after a moment."""

SUSPECT_S = 3.0
"""How long a replica that refused a connection is left out, unless it speaks up before."""


class Fleet:
    """Keeps the snapshot fresh in the background and counts this gateway's own requests."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._snapshot = Snapshot()
        self._in_flight: Counter[str] = Counter()
        self._suspects: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to follow the directory."""
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """Stop following."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    @property
    def replicas(self) -> tuple[ReplicaRecord, ...]:
        """All that are known."""
        return self._snapshot.replicas

    def tasks(self, base: str) -> tuple[str, ...]:
        """What the engines of a model do; empty as long as none has said."""
        return next((r.tasks for r in self._snapshot.replicas if r.base == base and r.tasks), ())

    def choose(self, base: str, adapter: str | None, avoid: Collection[str]) -> ReplicaRecord | None:
        """The replica for a request, or None. A suspect is better than none: it may be back."""
        now = time.monotonic()
        self._suspects = {key: until for key, until in self._suspects.items() if until > now}
        for left_out in ({*avoid, *self._suspects}, avoid):
            found = choose(self._snapshot, base, adapter=adapter, in_flight=self._in_flight, avoid=left_out)
            if found is not None:
                return found
        return None

    @contextlib.contextmanager
    def counting(self, replica: ReplicaRecord) -> Iterator[None]:
        """Count a request as this gateway's own work on a replica."""
        self._in_flight[replica.id] += 1
        try:
            yield
        finally:
            self._in_flight[replica.id] -= 1
            if not self._in_flight[replica.id]:
                del self._in_flight[replica.id]

    def suspect(self, replica: ReplicaRecord) -> None:
        """Leave a replica out for a while."""
        self._suspects[replica.id] = time.monotonic() + SUSPECT_S

    def holds(self, replica: ReplicaRecord, adapter: str) -> None:
        """Remember that a replica has loaded an adapter, until it says so itself."""
        if adapter not in replica.adapters:
            loaded = replace(replica, adapters=(*replica.adapters, adapter))
            replicas = tuple(loaded if r.id == replica.id else r for r in self._snapshot.replicas)
            self._snapshot = replace(self._snapshot, replicas=replicas)

    async def _follow(self) -> None:
        while True:
            try:
                self._snapshot = await self._watch(self._snapshot.version)
            except asyncio.CancelledError:
                raise
            except Exception:  # noqa: BLE001 - whatever Ray raises
                # The directory is being replaced: what is known stays good, connections find out the rest.
                await asyncio.sleep(0.5)
