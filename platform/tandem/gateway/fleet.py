"""The replicas as this gateway sees them: the directory's snapshot, what it has just found out by itself, and its router."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import replace

from tandem.serve.ask import Ask
from tandem.serve.directory import SILENCE_S
from tandem.serve.records import ReplicaRecord, Snapshot
from tandem.serve.router import Router

Watch = Callable[[int], Awaitable[Snapshot]]
"""Gives the directory's snapshot: at once if it is not of the version given, else when it changes or after a moment."""

SUSPECT_S = 3.0
"""How long a replica that refused a connection is left out, unless it speaks up before."""

PAUSE_S = 0.05
"""How long a snapshot is good enough, at least."""


class Fleet:
    """Keeps the router's snapshot fresh in the background, and tells it of this gateway's own requests."""

    def __init__(self, watch: Watch, router: Router | None = None) -> None:
        self._watch = watch
        self._router = router or Router()
        self._snapshot = Snapshot()
        self._suspects: dict[str, float] = {}
        self._carried: dict[str, float] = {}
        self._lost: set[str] = set()
        self.on_lost: Callable[[ReplicaRecord], None] = lambda replica: None
        """Called once for each replica of which nothing more will come."""
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

    def choose(self, ask: Ask, avoid: Collection[str]) -> ReplicaRecord | None:
        """The replica for a request, or None. A suspect is better than none: it may be back."""
        if self._suspects:
            now = time.monotonic()
            self._suspects = {key: until for key, until in self._suspects.items() if until > now}
            found = self._router.choose(ask, {*avoid, *self._suspects})
            if found is not None:
                return found
        return self._router.choose(ask, avoid)

    @contextlib.contextmanager
    def counting(self, ask: Ask, replica: ReplicaRecord) -> Iterator[None]:
        """Count a request as this gateway's own work on a replica."""
        self._router.began(ask, replica.id)
        try:
            yield
        finally:
            self._router.ended(ask, replica.id)

    def suspect(self, replica: ReplicaRecord) -> None:
        """Leave a replica out for a while."""
        self._suspects[replica.id] = time.monotonic() + SUSPECT_S

    def answered(self, ask: Ask, replica: ReplicaRecord) -> None:
        """A replica took a request, so it holds the adapter of it, whatever it last said."""
        self._router.loaded(ask, replica.id)

    def take(self, snapshot: Snapshot) -> None:
        """See the replicas as a directory's snapshot tells them.

        A directory that was made anew has not heard of all of them yet: the others stay as they were, for as long as one may be
        silent.
        """
        now, known = time.monotonic(), self._snapshot
        if known.born not in (0, snapshot.born):
            self._carried = {replica.id: now + SILENCE_S for replica in known.replicas if not replica.lost}
        heard = {replica.id for replica in snapshot.replicas}
        missing = [replica for replica in known.replicas if replica.id in self._carried and replica.id not in heard]
        waited = [replica for replica in missing if self._carried[replica.id] > now]
        self._carried = {replica.id: self._carried[replica.id] for replica in waited}
        self._snapshot = replace(snapshot, replicas=(*snapshot.replicas, *waited))
        self._router.update(self._snapshot)
        gone = [replica for replica in missing if replica.id not in self._carried]
        lost = [*gone, *(replica for replica in snapshot.replicas if replica.lost)]
        new = [replica for replica in lost if replica.id not in self._lost]
        self._lost = {replica.id for replica in lost}
        for replica in new:
            self.on_lost(replica)

    async def _follow(self) -> None:
        while True:
            try:
                self.take(await self._watch(self._snapshot.version))
                # Changes that come in a burst are taken together: a large fleet's adapters change all the time.
                await asyncio.sleep(PAUSE_S)
            except asyncio.CancelledError:
                raise
            except Exception:  # noqa: BLE001 - whatever Ray raises
                # The directory is being replaced: what is known stays good, connections find out the rest.
                await asyncio.sleep(0.5)
