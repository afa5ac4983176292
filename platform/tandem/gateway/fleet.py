"""Replicas as one gateway knows them: the directory's snapshot, its own observations (suspects, probes), and its router."""

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
"""Returns the directory's snapshot: at once if its version differs from the given one, else at a change or after a second."""

SUSPECT_FOR_S = 3.0
"""Seconds for which a replica that refused a connection gets no requests, unless it answers one before."""

MIN_UPDATE_INTERVAL_S = 0.05
"""Shortest time between two snapshots, in seconds."""

FIRST_SNAPSHOT_TIMEOUT_S = 5.0
"""Seconds that a new gateway waits for the first snapshot before it takes requests."""


class Fleet:
    """Follows the directory in the background and keeps the router informed of replicas and of this gateway's requests."""

    def __init__(
        self,
        watch: WatchReplicas,
        router: Router | None = None,
        *,
        models: Iterable[ServedModel] = (),
    ) -> None:
        """`models`: the served models; replicas of other versions of them are known by their deployment."""
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
        """Called for each lost replica, again with every snapshot in which it is lost."""
        self._listeners: list[Callable[[], None]] = []
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start following the directory; returns with its first complete snapshot, or after `FIRST_SNAPSHOT_TIMEOUT_S`."""
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
        """Register a function that is called at every change of the replicas, at least about once a second."""
        self._listeners.append(listener)

    @property
    def synced(self) -> bool:
        """Whether the directory has answered at all."""
        return self._synced.is_set()

    @property
    def replicas(self) -> tuple[ReplicaRecord, ...]:
        """All known replicas."""
        return self._snapshot.replicas

    def ready(self, pool: str, *, suspects: bool) -> list[ReplicaRecord]:
        """Ready replicas of a pool without suspects; with `suspects`, those too if there are no others.

        During a rolling change replicas of the model's other version count where the pool has none.
        """
        now = time.monotonic()
        ready = [r for r in self._snapshot.replicas if r.state == "ready"]
        found = [r for r in ready if r.pool == pool]
        if not found and (deployment := self._deployments.get(pool)):
            found = [r for r in ready if r.deployment == deployment]
        trusted = [r for r in found if self._suspects.get(r.id, 0.0) <= now]
        return found if suspects and not trusted else trusted

    def has_pool(self, pool: str) -> bool:
        """Whether a replica of exactly this pool is ready."""
        return any(r.pool == pool and r.state == "ready" for r in self._snapshot.replicas)

    def requests_outside(self, pool: str, replicas: Collection[ReplicaRecord]) -> int:
        """This gateway's requests in flight at replicas of a model other than these."""
        others = self._other_pools(pool) if pool in self._deployments else []
        return sum(self._router.requests_outside(each, {r.id for r in replicas}) for each in (pool, *others))

    def choose(self, request: RoutingRequest, exclude: Collection[str]) -> ReplicaRecord | None:
        """The replica for a request; None: there is none. During a rolling change the model's other version may answer."""
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
        # A suspect is better than no replica: it may have recovered.
        if self._suspects:
            now = time.monotonic()
            self._suspects = {key: until for key, until in self._suspects.items() if until > now}
            found = self._router.choose(request, {*exclude, *self._suspects})
            if found is not None:
                return found
        return self._router.choose(request, exclude)

    @contextlib.contextmanager
    def counting(self, request: RoutingRequest, replica: ReplicaRecord) -> Iterator[None]:
        """Count a request as this gateway's load on a replica for the length of a block."""
        request = _for_pool_of(request, replica)
        self._router.request_started(request, replica.id)
        try:
            yield
        finally:
            self._router.request_ended(request, replica.id)

    def suspect(self, replica: ReplicaRecord) -> None:
        """Give a replica no requests for `SUSPECT_FOR_S`."""
        self._suspects[replica.id] = time.monotonic() + SUSPECT_FOR_S
        asyncio.get_running_loop().call_later(SUSPECT_FOR_S + MIN_UPDATE_INTERVAL_S, self._notify)
        self._notify()

    def answered(self, request: RoutingRequest, replica: ReplicaRecord) -> None:
        """A replica has answered a request: it holds the request's adapter, and is no suspect."""
        self._router.adapter_loaded(_for_pool_of(request, replica), replica.id)
        if self._suspects.pop(replica.id, None) is not None:
            self._notify()

    def confirm(self, replica: ReplicaRecord, *, ready: bool) -> None:
        """Set whether a silent replica has answered a probe that it is ready; takes effect with the next snapshot."""
        if ready:
            self._confirmed.add(replica.id)
        else:
            self._confirmed.discard(replica.id)

    def _notify(self) -> None:
        for listener in self._listeners:
            listener()

    def apply_snapshot(self, snapshot: Snapshot) -> None:
        """Apply a directory's snapshot."""
        known = self._snapshot
        self._snapshot = with_confirmed(with_unheard(snapshot, known), self._confirmed)
        here = {replica.id for replica in self._snapshot.replicas}
        # A restarted directory has become complete without a heartbeat from these.
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
                # Bursts of changes are applied together: adapters of a large fleet change all the time.
                await asyncio.sleep(MIN_UPDATE_INTERVAL_S)
            except asyncio.CancelledError:
                raise
            except Exception:  # noqa: BLE001 - whatever Ray raises
                # The directory is being replaced: the known replicas stay, failed connections show which are gone.
                await asyncio.sleep(0.5)


def with_unheard(snapshot: Snapshot, known: Snapshot) -> Snapshot:
    """The snapshot, with known replicas added that an incomplete directory has not heard from yet. Pure."""
    if snapshot.complete:
        return snapshot
    heard = {replica.id for replica in snapshot.replicas}
    return replace(snapshot, replicas=(*snapshot.replicas, *(r for r in known.replicas if r.id not in heard)))


def with_confirmed(snapshot: Snapshot, known: Collection[str]) -> Snapshot:
    """The snapshot, with silent replicas in `known` marked ready. Pure."""
    if not known:
        return snapshot
    ready = (replace(r, state="ready") if r.state == "silent" and r.id in known else r for r in snapshot.replicas)
    return replace(snapshot, replicas=tuple(ready))


def _for_pool_of(request: RoutingRequest, replica: ReplicaRecord) -> RoutingRequest:
    return request if request.pool == replica.pool else replace(request, pool=replica.pool)
