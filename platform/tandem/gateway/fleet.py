"""The replicas as this gateway sees them: the directory's snapshot, what it has just found out by itself, and its router."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from dataclasses import replace

from tandem.routing.records import ReplicaRecord, ServedModel, Snapshot
from tandem.routing.request import RoutingRequest
from tandem.routing.router import Router

WatchReplicas = Callable[[int], Awaitable[Snapshot]]
"""Gives the directory's snapshot: at once if it is not of the version given, else when it changes or after a moment."""

SUSPECT_FOR_S = 3.0
"""How long a replica that refused a connection is left out, unless it speaks up before."""

MIN_UPDATE_INTERVAL_S = 0.05
"""How long a snapshot is good enough, at least."""

FIRST_SNAPSHOT_TIMEOUT_S = 5.0
"""How long a new gateway waits to hear of the replicas before it takes requests."""


class Fleet:
    """Keeps the router's snapshot fresh in the background, and tells it of this gateway's own requests."""

    def __init__(
        self,
        watch: WatchReplicas,
        router: Router | None = None,
        *,
        models: Iterable[ServedModel] = (),
    ) -> None:
        """`models`: what is served, so that other versions of it are known."""
        self._watch_replicas = watch
        self._router = router or Router()
        models = tuple(models)
        self._deployments = {model.id: model.deployment for model in models}
        self._always_on = {model.id for model in models if not model.scales_to_zero}
        self._snapshot = Snapshot()
        self.tasks: dict[str, tuple[str, ...]] = {}
        """Tasks that the engines of each pool have reported."""
        self._synced = asyncio.Event()
        self._suspects: dict[str, float] = {}
        self._unheard: set[str] = set()
        self._confirmed: set[str] = set()
        self.on_lost: Callable[[ReplicaRecord], None] = lambda replica: None
        """Called for each replica of which nothing more may come, again with every snapshot that says so."""
        self._listeners: list[Callable[[], None]] = []
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to follow the directory, and wait until it has told of the replicas, but not for ever."""
        self._task = asyncio.create_task(self._follow())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._synced.wait(), FIRST_SNAPSHOT_TIMEOUT_S)

    async def stop(self) -> None:
        """Stop following."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def add_listener(self, listener: Callable[[], None]) -> None:
        """Have it called whenever there is news of the replicas, about once a second at least."""
        self._listeners.append(listener)

    @property
    def replicas(self) -> tuple[ReplicaRecord, ...]:
        """All that are known."""
        return self._snapshot.replicas

    def ready(self, pool: str, *, suspects: bool) -> list[ReplicaRecord]:
        """The replicas of a model that take requests; where none but `suspects` is left, those, or none of them.

        While a model changes, those of its other version are better than none.
        """
        now = time.monotonic()
        ready = [r for r in self._snapshot.replicas if r.state == "ready"]
        found = [r for r in ready if r.pool == pool]
        if not found and (deployment := self._deployments.get(pool)):
            found = [r for r in ready if r.deployment == deployment]
        trusted = [r for r in found if self._suspects.get(r.id, 0.0) <= now]
        return found if suspects and not trusted else trusted

    def has_pool(self, pool: str) -> bool:
        """Whether a replica of just this pool is ready."""
        return any(r.pool == pool and r.state == "ready" for r in self._snapshot.replicas)

    def requests_outside(self, pool: str, replicas: Collection[ReplicaRecord]) -> int:
        """This gateway's own requests in flight at replicas of a model other than these."""
        others = self._other_pools(pool) if pool in self._deployments else []
        return sum(self._router.requests_outside(each, {r.id for r in replicas}) for each in (pool, *others))

    def choose(self, request: RoutingRequest, exclude: Collection[str]) -> ReplicaRecord | None:
        """The replica for a request, or None. While a model changes, one of its other version is better than none."""
        found = self._choose_in_pool(request, exclude)
        if found is None and not request.pinned and request.pool in self._deployments:
            for pool in self._other_pools(request.pool):
                found = self._choose_in_pool(replace(request, pool=pool), exclude)
                if found is not None:
                    return found
        return found

    def _other_pools(self, pool: str) -> list[str]:
        deployment = self._deployments[pool]
        found = {r.pool for r in self._snapshot.replicas if r.deployment == deployment and r.pool != pool}
        return sorted(found)

    def _choose_in_pool(self, request: RoutingRequest, exclude: Collection[str]) -> ReplicaRecord | None:
        # A suspect is better than none: it may be back.
        if self._suspects:
            now = time.monotonic()
            self._suspects = {key: until for key, until in self._suspects.items() if until > now}
            found = self._router.choose(request, {*exclude, *self._suspects})
            if found is not None:
                return found
        return self._router.choose(request, exclude)

    @contextlib.contextmanager
    def counting(self, request: RoutingRequest, replica: ReplicaRecord) -> Iterator[None]:
        """Count a request as this gateway's own work on a replica."""
        request = _for_pool_of(request, replica)
        self._router.request_started(request, replica.id)
        try:
            yield
        finally:
            self._router.request_ended(request, replica.id)

    def suspect(self, replica: ReplicaRecord) -> None:
        """Leave a replica out for a while."""
        self._suspects[replica.id] = time.monotonic() + SUSPECT_FOR_S
        asyncio.get_running_loop().call_later(SUSPECT_FOR_S + MIN_UPDATE_INTERVAL_S, self._notify)
        self._notify()

    def answered(self, request: RoutingRequest, replica: ReplicaRecord) -> None:
        """A replica took a request, so it holds the adapter of it, whatever it last said."""
        self._router.adapter_loaded(_for_pool_of(request, replica), replica.id)
        if self._suspects.pop(replica.id, None) is not None:
            self._notify()

    def confirm(self, replica: ReplicaRecord, *, ready: bool) -> None:
        """Say of a silent replica what it said itself: whether it takes requests. Counts from the next snapshot on."""
        if ready:
            self._confirmed.add(replica.id)
        else:
            self._confirmed.discard(replica.id)

    def _notify(self) -> None:
        for listener in self._listeners:
            listener()

    def apply_snapshot(self, snapshot: Snapshot) -> None:
        """See the replicas as a directory tells them."""
        known = self._snapshot
        self._snapshot = with_confirmed(with_unheard(snapshot, known), self._confirmed)
        here = {replica.id for replica in self._snapshot.replicas}
        # A directory that began anew has listened long enough, and did not hear of these.
        gone = [replica for replica in known.replicas if replica.id in self._unheard and replica.id not in here]
        self._unheard = here - {replica.id for replica in snapshot.replicas}
        self._router.update(self._snapshot)
        self.tasks = {r.pool: r.tasks for r in reversed(self._snapshot.replicas) if r.tasks}
        lost = [*gone, *(replica for replica in snapshot.replicas if replica.lost)]
        self._confirmed &= {replica.id for replica in lost}
        for replica in lost:
            self.on_lost(replica)
        self._notify()
        if self._snapshot.complete or all(map(self.has_pool, self._always_on)):
            self._synced.set()

    async def _follow(self) -> None:
        while True:
            try:
                self.apply_snapshot(await self._watch_replicas(self._snapshot.version))
                # Changes that come in a burst are taken together: a large fleet's adapters change all the time.
                await asyncio.sleep(MIN_UPDATE_INTERVAL_S)
            except asyncio.CancelledError:
                raise
            except Exception:  # noqa: BLE001 - whatever Ray raises
                # The directory is being replaced: what is known stays good, connections find out the rest.
                await asyncio.sleep(0.5)


def with_unheard(snapshot: Snapshot, known: Snapshot) -> Snapshot:
    """What a directory tells; if it has just begun to listen, with what was known before and it has not heard of yet. Pure."""
    if snapshot.complete:
        return snapshot
    heard = {replica.id for replica in snapshot.replicas}
    return replace(snapshot, replicas=(*snapshot.replicas, *(r for r in known.replicas if r.id not in heard)))


def with_confirmed(snapshot: Snapshot, known: Collection[str]) -> Snapshot:
    """What a directory tells, but that those silent replicas are ready which are known to be. Pure."""
    if not known:
        return snapshot
    ready = (replace(r, state="ready") if r.state == "silent" and r.id in known else r for r in snapshot.replicas)
    return replace(snapshot, replicas=tuple(ready))


def _for_pool_of(request: RoutingRequest, replica: ReplicaRecord) -> RoutingRequest:
    return request if request.pool == replica.pool else replace(request, pool=replica.pool)
