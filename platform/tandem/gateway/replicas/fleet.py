"""Replicas as one gateway knows them: the directory's updates, its own observations (suspects, probes), and its router."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from dataclasses import replace

from tandem.gateway.replicas.suspects import Suspects
from tandem.routing.changes import Update
from tandem.routing.fleet_view import FleetView
from tandem.routing.records import ReplicaRecord, ServedModel, Snapshot
from tandem.routing.request import RoutingRequest
from tandem.routing.router import Router
from tandem.tasks import stop

WatchReplicas = Callable[[int], Awaitable[Update]]
"""Returns the directory's next update for a version: a snapshot or the changes since, at once if there are any, else at a change
or after a second. Version 0 asks for a snapshot."""
Listener = Callable[[Collection[str] | None], None]
"""Called with the pools and deployments whose replicas changed; None: possibly all of them."""

MIN_UPDATE_INTERVAL_S = 0.05
"""Shortest time between two updates, in seconds."""
NOTIFY_S = 1.0
"""Seconds after which listeners are called, and lost replicas reported, without a change."""
FIRST_SNAPSHOT_TIMEOUT_S = 5.0
"""Seconds that a new gateway waits for the first snapshot before it takes requests."""
STALE_AFTER_S = 15.0
"""Seconds without an update after which a gateway's copy of the directory is stale. Replacing a directory takes less."""


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
        self._view = FleetView()
        self._ready: dict[str, dict[str, ReplicaRecord]] = {}
        """Ready replicas by pool."""
        self._pools: dict[str, dict[str, ReplicaRecord]] = {}
        """All replicas by pool."""
        self._num_by_deployment: dict[str, dict[str, int]] = {}
        """Numbers of replicas, ready or not, by deployment and pool."""
        self.tasks: dict[str, tuple[str, ...]] = {}
        """Tasks that the engines of each pool have reported."""
        self._synced = asyncio.Event()
        self._suspects = Suspects()
        self._probing: set[asyncio.Task[None]] = set()
        self._updated_at = -math.inf
        self._notified_at = -math.inf
        self.on_lost: Callable[[ReplicaRecord], None] = lambda replica: None
        """Called for each lost replica, at once and then every second while it is lost."""
        self.probe: Callable[[ReplicaRecord], Awaitable[bool]] | None = None
        """Whether a replica is ready to take requests; asked before an ejected one gets any."""
        self._listeners: list[Listener] = []
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start following the directory; returns with its first complete snapshot, or after `FIRST_SNAPSHOT_TIMEOUT_S`."""
        self._task = asyncio.create_task(self._follow())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._synced.wait(), FIRST_SNAPSHOT_TIMEOUT_S)

    async def stop(self) -> None:
        """Stop following."""
        for task in self._probing:
            task.cancel()
        await stop(self._task)

    def add_listener(self, listener: Listener) -> None:
        """Register a function that is called at every change of the replicas, at least about once a second."""
        self._listeners.append(listener)

    @property
    def synced(self) -> bool:
        """Whether the directory has sent all replicas, or one of each model, at least once."""
        return self._synced.is_set()

    @property
    def fresh(self) -> bool:
        """Whether the directory has sent all replicas, and its last update is at most `STALE_AFTER_S` old."""
        return self.synced and time.monotonic() - self._updated_at < STALE_AFTER_S

    @property
    def replicas(self) -> tuple[ReplicaRecord, ...]:
        """All known replicas."""
        return tuple(self._view.records.values())

    def ready(self, pool: str, *, suspects: bool) -> list[ReplicaRecord]:
        """Ready replicas of a pool without suspects; with `suspects`, those too if there are no others.

        During a rolling change replicas of the model's other version count where the pool has none.
        """
        replicas = list(self._ready.get(pool, {}).values())
        if not replicas and pool in self._deployments:
            replicas = [
                record for other_pool in self._other_pools(pool) for record in self._ready.get(other_pool, {}).values()
            ]
        trusted = [replica for replica in replicas if replica.id not in self._suspects.ejected]
        return replicas if suspects and not trusted else trusted

    def is_lost(self, replica: ReplicaRecord) -> bool:
        """Whether the directory calls a replica lost."""
        return replica.id in self._view.lost

    def has_pool(self, pool: str) -> bool:
        """Whether a replica of exactly this pool is ready."""
        return bool(self._ready.get(pool))

    def requests_outside(self, pool: str, replicas: Collection[ReplicaRecord]) -> int:
        """This gateway's requests in flight at replicas of a model other than these."""
        other_pools = self._other_pools(pool) if pool in self._deployments else []
        replica_ids = {replica.id for replica in replicas}
        return sum(self._router.requests_outside(pool_id, replica_ids) for pool_id in (pool, *other_pools))

    def choose(self, request: RoutingRequest, exclude: Collection[str]) -> ReplicaRecord | None:
        """The replica for a request; None: there is none. During a rolling change the model's other version may answer."""
        replica = self._choose_in_pool(request, exclude)
        if replica is None and not request.pinned and request.pool in self._deployments:
            for pool in self._other_pools(request.pool):
                replica = self._choose_in_pool(replace(request, pool=pool), exclude)
                if replica is not None:
                    return replica
        return replica

    def _other_pools(self, pool: str) -> list[str]:
        return sorted(
            other_pool for other_pool in self._num_by_deployment.get(self._deployments[pool], ()) if other_pool != pool
        )

    def _choose_in_pool(self, request: RoutingRequest, exclude: Collection[str]) -> ReplicaRecord | None:
        # A suspect is better than no replica: it may have recovered.
        if self._suspects.ejected:
            replica = self._router.choose(request, {*exclude, *self._suspects.ejected})
            if replica is not None:
                return replica
        return self._router.choose(request, exclude)

    @contextlib.contextmanager
    def counting(self, request: RoutingRequest, replica: ReplicaRecord) -> Iterator[None]:
        """Count a request as this gateway's load on a replica for the length of a block."""
        request = _with_pool_of(request, replica)
        self._router.request_started(request, replica.id)
        try:
            yield
        finally:
            self._router.request_ended(request, replica.id)

    def suspect(self, replica: ReplicaRecord) -> None:
        """A replica failed a request: it gets none for some seconds, for longer each time, until a probe finds it ready."""
        self._eject(replica, self._suspects.suspect(replica.id))

    def answered(self, request: RoutingRequest, replica: ReplicaRecord) -> None:
        """A replica has answered a request: it holds the request's adapter, and is no suspect."""
        self._router.adapter_loaded(_with_pool_of(request, replica), replica.id)
        if self._suspects.answered(replica.id):
            self._notify(_pool_and_deployment(replica))

    def confirm(self, replica: ReplicaRecord, *, ready: bool) -> None:
        """Set whether a silent replica has answered a probe that it is ready; takes effect with the next update."""
        self._view.confirm(replica.id, ready=ready)

    def _eject(self, replica: ReplicaRecord, seconds: float | None) -> None:
        if seconds is not None:
            task = asyncio.get_running_loop().create_task(self._readmit(replica, seconds))
            self._probing.add(task)
            task.add_done_callback(self._probing.discard)
            self._notify(_pool_and_deployment(replica))

    async def _readmit(self, replica: ReplicaRecord, ejection_s: float) -> None:
        """Probe an ejected replica when its ejection ends."""
        await asyncio.sleep(ejection_s)
        if replica.id not in self._suspects.ejected:
            return
        if self.probe is None or await self.probe(replica):
            if self._suspects.readmit(replica.id):
                self._notify(_pool_and_deployment(replica))
        else:
            self._eject(replica, self._suspects.probe_failed(replica.id))

    def _notify(self, keys: Collection[str] | None = None) -> None:
        if keys is None:
            self._notified_at = time.monotonic()
        for listener in self._listeners:
            listener(keys)

    def apply(self, update: Update) -> None:
        """Apply an update of the directory. VersionMismatchError, and no effect, if it needs another version."""
        was_lost = set(self._view.lost)
        change = self._view.apply(update)
        self._updated_at = time.monotonic()
        keys = {key for record in change.changed for key in self._index(record)}
        for record in change.removed:
            keys |= self._unindex(record)
        self._suspects.forget(record.id for record in change.removed)
        self._router.apply(change.changed, change.removed)
        notify_all = self._updated_at - self._notified_at >= NOTIFY_S
        report_all_lost = notify_all or isinstance(update, Snapshot)
        for replica in change.never_reported:
            self.on_lost(replica)
        for key in self._view.lost if report_all_lost else self._view.lost - was_lost:
            self.on_lost(self._view.reported[key])
        if notify_all or keys:
            self._notify(None if notify_all else keys)
        if self._view.complete or all(map(self.has_pool, self._always_on)):
            self._synced.set()

    def _index(self, record: ReplicaRecord) -> set[str]:
        """Index a record. Returns its pool and deployment if its state or capacity changed, else nothing."""
        pool = self._pools.setdefault(record.pool, {})
        previous = pool.get(record.id)
        pool[record.id] = record
        if previous is None:
            counts = self._num_by_deployment.setdefault(record.deployment, {})
            counts[record.pool] = counts.get(record.pool, 0) + 1
        ready = self._ready.setdefault(record.pool, {})
        if record.state == "ready":
            ready[record.id] = record
        else:
            ready.pop(record.id, None)
        if record.tasks and (previous is None or previous.tasks != record.tasks):
            self.tasks[record.pool] = record.tasks
        if previous is not None and (previous.state, previous.max_running) == (record.state, record.max_running):
            return set()
        return _pool_and_deployment(record)

    def _unindex(self, record: ReplicaRecord) -> set[str]:
        """Remove a record from the index. Returns its pool and deployment."""
        self._ready.get(record.pool, {}).pop(record.id, None)
        pool = self._pools.get(record.pool, {})
        if pool.pop(record.id, None) is not None:
            counts = self._num_by_deployment[record.deployment]
            counts[record.pool] -= 1
            if not counts[record.pool]:
                del counts[record.pool]
        if not pool:
            self.tasks.pop(record.pool, None)
            self._pools.pop(record.pool, None)
        return _pool_and_deployment(record)

    async def _follow(self) -> None:
        version = 0
        while True:
            try:
                self.apply(await self._watch_replicas(version))
                version = self._view.version
                # Bursts of changes are applied together: adapters of a large fleet change all the time.
                await asyncio.sleep(MIN_UPDATE_INTERVAL_S)
            except asyncio.CancelledError:
                raise
            except Exception:  # noqa: BLE001 - whatever Ray or the network raises
                # The directory is being replaced: the known replicas stay, failed connections show which are gone.
                version = 0
                await asyncio.sleep(0.5)


def _pool_and_deployment(record: ReplicaRecord) -> set[str]:
    return {record.pool, record.deployment}


def _with_pool_of(request: RoutingRequest, replica: ReplicaRecord) -> RoutingRequest:
    return request if request.pool == replica.pool else replace(request, pool=replica.pool)
