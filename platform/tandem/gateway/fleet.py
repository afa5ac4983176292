"""The replicas as this gateway sees them: the directory's snapshot, what it has just found out by itself, and its router."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Iterator

from tandem.serve.ask import Ask
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
        self._listeners: list[Callable[[], None]] = []
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

    def listen(self, listener: Callable[[], None]) -> None:
        """Have it called whenever there is news of the replicas, about once a second at least."""
        self._listeners.append(listener)

    @property
    def replicas(self) -> tuple[ReplicaRecord, ...]:
        """All that are known."""
        return self._snapshot.replicas

    def tasks(self, base: str) -> tuple[str, ...]:
        """What the engines of a model do; empty as long as none has said."""
        return next((r.tasks for r in self._snapshot.replicas if r.base == base and r.tasks), ())

    def ready(self, base: str, *, suspects: bool) -> list[ReplicaRecord]:
        """The replicas of a model that take requests; where none but `suspects` is left, those, or none of them."""
        now = time.monotonic()
        found = [r for r in self._snapshot.replicas if r.base == base and r.state == "ready"]
        trusted = [r for r in found if self._suspects.get(r.id, 0.0) <= now]
        return found if suspects and not trusted else trusted

    def carried(self, base: str, but: Collection[ReplicaRecord]) -> int:
        """This gateway's own requests in flight at replicas of a model other than these."""
        return self._router.carried(base, {r.id for r in but})

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
        asyncio.get_running_loop().call_later(SUSPECT_S + PAUSE_S, self._tell)
        self._tell()

    def answered(self, ask: Ask, replica: ReplicaRecord) -> None:
        """A replica took a request, so it holds the adapter of it, whatever it last said."""
        self._router.loaded(ask, replica.id)
        if self._suspects.pop(replica.id, None) is not None:
            self._tell()

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    async def _follow(self) -> None:
        while True:
            try:
                self._snapshot = await self._watch(self._snapshot.version)
                self._router.update(self._snapshot)
                self._tell()
                # Changes that come in a burst are taken together: a large fleet's adapters change all the time.
                await asyncio.sleep(PAUSE_S)
            except asyncio.CancelledError:
                raise
            except Exception:  # noqa: BLE001 - whatever Ray raises
                # The directory is being replaced: what is known stays good, connections find out the rest.
                await asyncio.sleep(0.5)
