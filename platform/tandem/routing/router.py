"""Router: chooses the replica for a request. Pure: callers pass snapshots, their own requests and the random generator.

A router belongs to one gateway and lives in its event loop. A decision looks at a bounded number of replicas, however many there
are; bench/routing/router_sim.py measures its cost.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable

from tandem.config.serving.app import RouterConfig
from tandem.routing.affinity import PrefixHistory, SessionHistory
from tandem.routing.index import ReplicaIndex
from tandem.routing.policies import RoutingContext, find_policy
from tandem.routing.records import ReplicaRecord, Snapshot
from tandem.routing.request import RoutingRequest


class Router:
    """One gateway's indexes of all replica pools, its histories, and the policy that chooses."""

    def __init__(
        self, config: RouterConfig | None = None, rng: random.Random | None = None, *, gateways: int = 1
    ) -> None:
        """`gateways`: number of gateways, this one included."""
        self._config = config or RouterConfig()
        self._policy = find_policy(self._config.policy)
        self._rng = rng or random.Random()
        self._prefixes = PrefixHistory(self._config.remembered_blocks)
        self._sessions = SessionHistory(self._config.remembered_sessions)
        self._indexes: dict[str, ReplicaIndex] = {}
        self._home_requests = self._config.home_requests * (gateways > 1)

    def update(self, snapshot: Snapshot) -> None:
        """Apply the directory's newest snapshot."""
        by_pool: dict[str, list[ReplicaRecord]] = {pool_id: [] for pool_id in self._indexes}
        for record in snapshot.replicas:
            by_pool.setdefault(record.pool, []).append(record)
        for pool_id, records in by_pool.items():
            index = self._indexes.get(pool_id)
            if index is None:
                index = self._indexes[pool_id] = ReplicaIndex(self._rng)
            index.update(records)

    def apply(self, changed: Iterable[ReplicaRecord], removed: Iterable[ReplicaRecord]) -> None:
        """Apply changes of some replicas; the others stay as they are."""
        by_pool: dict[str, tuple[list[ReplicaRecord], list[str]]] = {}
        for record in changed:
            by_pool.setdefault(record.pool, ([], []))[0].append(record)
        for record in removed:
            by_pool.setdefault(record.pool, ([], []))[1].append(record.id)
        for pool_id, (records, removed_ids) in by_pool.items():
            index = self._indexes.get(pool_id)
            if index is None:
                index = self._indexes[pool_id] = ReplicaIndex(self._rng)
            index.apply(records, removed_ids)

    def choose(self, request: RoutingRequest, exclude: Collection[str] = ()) -> ReplicaRecord | None:
        """The replica for a request; None if no replica of its pool is ready outside `exclude`."""
        index = self._indexes.get(request.pool)
        if index is None or not len(index):
            return None
        context = RoutingContext(
            self._config, index, self._prefixes, self._sessions, exclude, self._rng, self._home_requests
        )
        replica = self._policy(request, context)
        if replica is None or replica not in index or replica in exclude:
            replica = index.load_buckets.least_loaded(self._rng, exclude)
        return None if replica is None else index.record(replica)

    def request_started(self, request: RoutingRequest, replica: str) -> None:
        """A request is sent to a replica; `request_ended` must follow."""
        self._index(request.pool).request_started(replica, request.adapter)
        if request.prefix_hashes:
            self._prefixes.record(request.prefix_hashes, replica)
        if request.session is not None:
            self._sessions.record(request.session, replica)

    def request_ended(self, request: RoutingRequest, replica: str) -> None:
        """A request that was sent has ended, in whatever way."""
        self._index(request.pool).request_ended(replica, request.adapter)

    def adapter_loaded(self, request: RoutingRequest, replica: str) -> None:
        """A replica has answered a request, so it holds the request's adapter."""
        if request.adapter is not None:
            self._index(request.pool).adapter_loaded(replica, request.adapter)

    def requests_outside(self, pool_id: str, replicas: Collection[str]) -> int:
        """This gateway's requests in flight at replicas of a pool other than these."""
        index = self._indexes.get(pool_id)
        return 0 if index is None else index.requests_outside(replicas)

    def _index(self, pool_id: str) -> ReplicaIndex:
        return self._indexes[pool_id]
