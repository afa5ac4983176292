"""Chooses the replica for a request. Pure: callers pass the directory's snapshots, their own requests and the dice.

A router belongs to one gateway and lives in its event loop. A decision looks at a bounded number of replicas, whatever their
number; what it costs is measured in bench/routing/router_sim.py.
"""

from __future__ import annotations

import random
from collections.abc import Collection

from tandem.config.serving.app import RouterConfig
from tandem.routing.affinity import PrefixMemory, SessionMemory
from tandem.routing.index import Pool
from tandem.routing.policies import Sight, find_policy
from tandem.routing.records import ReplicaRecord, Snapshot
from tandem.routing.request import Ask


class Router:
    """What one gateway knows of all replicas, and the policy that chooses among them."""

    def __init__(
        self, config: RouterConfig | None = None, dice: random.Random | None = None, *, gateways: int = 1
    ) -> None:
        """`gateways`: how many there are, this one among them."""
        self._config = config or RouterConfig()
        self._policy = find_policy(self._config.policy)
        self._dice = dice or random.Random()
        self._prefixes = PrefixMemory(self._config.remembered_blocks)
        self._sessions = SessionMemory(self._config.remembered_sessions)
        self._pools: dict[str, Pool] = {}
        self._home_requests = self._config.home_requests * (gateways > 1)

    def update(self, snapshot: Snapshot) -> None:
        """Take the directory's newest snapshot."""
        by_base: dict[str, list[ReplicaRecord]] = {base: [] for base in self._pools}
        for record in snapshot.replicas:
            by_base.setdefault(record.base, []).append(record)
        for base, records in by_base.items():
            pool = self._pools.get(base)
            if pool is None:
                pool = self._pools[base] = Pool(self._dice)
            pool.take(records)

    def choose(self, ask: Ask, avoid: Collection[str] = ()) -> ReplicaRecord | None:
        """The replica for a request, or None if none is ready that need not be avoided."""
        pool = self._pools.get(ask.base)
        if pool is None or not len(pool):
            return None
        sight = Sight(self._config, pool, self._prefixes, self._sessions, avoid, self._dice, self._home_requests)
        found = self._policy(ask, sight)
        if found is None or found not in pool or found in avoid:
            found = pool.levels.idlest(self._dice, avoid)
        return None if found is None else pool.record(found)

    def began(self, ask: Ask, replica: str) -> None:
        """A request is on its way to a replica; `ended` must follow."""
        self._pool(ask.base).began(replica, ask.adapter)
        if ask.blocks:
            self._prefixes.note(ask.blocks, replica)
        if ask.session is not None:
            self._sessions.note(ask.session, replica)

    def ended(self, ask: Ask, replica: str) -> None:
        """A request that began is over, however it ended."""
        self._pool(ask.base).ended(replica, ask.adapter)

    def loaded(self, ask: Ask, replica: str) -> None:
        """A replica answered a request, so it holds the adapter of it."""
        if ask.adapter is not None:
            self._pool(ask.base).loaded(replica, ask.adapter)

    def carried(self, base: str, but: Collection[str]) -> int:
        """This gateway's own requests in flight at replicas of a base other than these."""
        pool = self._pools.get(base)
        return 0 if pool is None else pool.carried_by_others(but)

    def _pool(self, base: str) -> Pool:
        return self._pools[base]
