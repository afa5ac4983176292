"""Index of the ready replicas of one pool: load buckets, adapters, hash ring. No decision looks at all replicas. Pure.

A heartbeat, the start and the end of a request cost a few dictionary entries each. The hash ring is rebuilt only when replicas
join or leave.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from tandem.routing.hash_ring import HashRing
from tandem.routing.records import ReplicaRecord

WAITING_WEIGHT = 2
"""Load of a waiting request beyond the 1 that it counts as a request: a replica with a queue has no free capacity."""
KV_PRESSURE_FROM = 0.9
"""Share of the KV cache above which a replica is about to preempt running requests."""
KV_PRESSURE_REQUESTS = 16
"""Load of a full KV cache, in requests; above `KV_PRESSURE_FROM` in proportion."""
HOST_MEMORY_SHARE = 0.5
"""Value of an adapter in host memory relative to one in a slot: it may have to wait for a slot."""


class LoadBuckets:
    """Replicas grouped by load: the least loaded one, and a change of load, in constant time."""

    def __init__(self) -> None:
        self._load: dict[str, int] = {}
        self._position: dict[str, int] = {}
        self._buckets: dict[int, list[str]] = {}
        self._lowest = 0
        self._total = 0

    def __contains__(self, replica: str) -> bool:
        return replica in self._load

    def get(self, replica: str) -> int | None:
        """Load of a replica, in requests; None: unknown replica."""
        return self._load.get(replica)

    def set(self, replica: str, load: int) -> None:
        """Add a replica or change its load."""
        old_load = self._load.get(replica)
        if old_load == load:
            return
        if old_load is not None:
            self._remove(replica, old_load)
        bucket = self._buckets.get(load)
        if bucket is None:
            bucket = self._buckets[load] = []
        self._position[replica] = len(bucket)
        bucket.append(replica)
        self._load[replica] = load
        self._total += load - (old_load or 0)
        if load < self._lowest or self._lowest not in self._buckets:
            self._lowest = load if old_load is None or load <= old_load else min(self._buckets)

    def drop(self, replica: str) -> None:
        """Remove a replica."""
        load = self._load.pop(replica, None)
        if load is not None:
            self._total -= load
            self._remove(replica, load)
            if self._buckets and self._lowest not in self._buckets:
                self._lowest = min(self._buckets)

    def mean(self) -> float:
        """Mean load of a replica."""
        return self._total / len(self._load) if self._load else 0.0

    def spread(self) -> int:
        """Difference between the largest and the smallest load."""
        return max(self._buckets) - min(self._buckets) if self._buckets else 0

    def least_loaded(self, rng: random.Random, exclude: Collection[str] = ()) -> str | None:
        """A random one of the least loaded replicas outside `exclude`; None: there is none."""
        if not self._buckets:
            return None
        bucket = self._buckets[self._lowest]
        replica = bucket[int(rng.random() * len(bucket))]
        if replica not in exclude:
            return replica
        for load in sorted(self._buckets):
            candidates = [replica for replica in self._buckets[load] if replica not in exclude]
            if candidates:
                return candidates[int(rng.random() * len(candidates))]
        return None

    def _remove(self, replica: str, load: int) -> None:
        bucket, position = self._buckets[load], self._position[replica]
        last = bucket.pop()
        if last != replica:
            bucket[position] = last
            self._position[last] = position
        elif not bucket:
            del self._buckets[load]


class ReplicaIndex:
    """The ready replicas of one pool with their loads and adapters, as this gateway knows them."""

    def __init__(self, rng: random.Random) -> None:
        self.load_buckets = LoadBuckets()
        self.ring = HashRing()
        self.next_turn = rng.getrandbits(16)
        """Position of `round_robin`; gateways start at different ones."""
        self._rng = rng
        self._ready: list[str] = []
        self._position: dict[str, int] = {}
        self._records: dict[str, ReplicaRecord] = {}
        self._other_load: dict[str, int] = {}
        self._own_requests: Counter[str] = Counter()
        self._own_by_adapter: dict[str, Counter[str]] = {}
        self._resident: dict[str, set[str]] = {}
        self._holders: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return len(self._ready)

    def __contains__(self, replica: str) -> bool:
        return replica in self._position

    @property
    def ready(self) -> list[str]:
        """Replica ids, unordered."""
        return self._ready

    def record(self, replica: str) -> ReplicaRecord:
        """The replica as it last described itself."""
        return self._records[replica]

    # ---- updates ------------------------------------------------------------------------------------------------------

    def update(self, records: Iterable[ReplicaRecord]) -> None:
        """Replace the replicas of the pool."""
        ready_ids = set()
        has_new = False
        for record in records:
            if record.state == "ready":
                ready_ids.add(record.id)
                has_new |= record.id not in self._position
                self._set_record(record)
        removed = self._position.keys() - ready_ids
        for replica in removed:
            self._drop(replica)
        if has_new or removed:
            self.ring.set(self._ready)

    def apply(self, changed: Iterable[ReplicaRecord], removed: Iterable[str]) -> None:
        """Apply changes of some replicas of the pool; the others stay as they are."""
        is_changed = False
        for record in changed:
            if record.state == "ready":
                is_changed |= record.id not in self._position
                self._set_record(record)
            elif record.id in self._position:
                is_changed = True
                self._drop(record.id)
        for replica in removed:
            if replica in self._position:
                is_changed = True
                self._drop(replica)
        if is_changed:
            self.ring.set(self._ready)

    def request_started(self, replica: str, adapter: str | None) -> None:
        """This gateway sends a request to a replica."""
        self._own_requests[replica] += 1
        if adapter is not None:
            self._own_by_adapter.setdefault(adapter, Counter())[replica] += 1
        self._update_load(replica)

    def request_ended(self, replica: str, adapter: str | None) -> None:
        """A request of this gateway has ended."""
        self._own_requests[replica] -= 1
        if not self._own_requests[replica]:
            del self._own_requests[replica]
        if adapter is not None:
            carried = self._own_by_adapter[adapter]
            carried[replica] -= 1
            if not carried[replica]:
                del carried[replica]
                if not carried:
                    del self._own_by_adapter[adapter]
        self._update_load(replica)

    def adapter_loaded(self, replica: str, adapter: str) -> None:
        """A replica has answered a request for an adapter, so it holds the adapter until its next report."""
        resident = self._resident.get(replica)
        if resident is not None and adapter not in resident:
            resident.add(adapter)
            self._holders.setdefault(adapter, []).append(replica)

    def _set_record(self, record: ReplicaRecord) -> None:
        replica = record.id
        if replica not in self._position:
            self._position[replica] = len(self._ready)
            self._ready.append(replica)
            self._resident[replica] = set()
        self._records[replica] = record
        # The report includes this gateway's own requests, which are counted here exactly; the rest are other gateways'.
        own_load = self._own_requests.get(replica, 0)
        other_load = record.waiting * WAITING_WEIGHT
        if record.running + record.waiting > own_load:
            other_load += record.running + record.waiting - own_load
        if record.kv_usage > KV_PRESSURE_FROM:
            other_load += int((record.kv_usage - KV_PRESSURE_FROM) / (1 - KV_PRESSURE_FROM) * KV_PRESSURE_REQUESTS)
        self._other_load[replica] = other_load
        self.load_buckets.set(replica, other_load + own_load)
        resident = self._resident[replica]
        if len(resident) != len(record.adapters) or not resident.issuperset(record.adapters):
            self._set_adapters(replica, set(record.adapters))

    def _set_adapters(self, replica: str, adapters: set[str]) -> None:
        old_adapters = self._resident[replica]
        for adapter in old_adapters - adapters:
            holders = self._holders[adapter]
            holders.remove(replica)
            if not holders:
                del self._holders[adapter]
        for adapter in adapters - old_adapters:
            self._holders.setdefault(adapter, []).append(replica)
        self._resident[replica] = adapters

    def _drop(self, replica: str) -> None:
        self._set_adapters(replica, set())
        position, last = self._position.pop(replica), self._ready.pop()
        if last != replica:
            self._ready[position] = last
            self._position[last] = position
        del self._records[replica], self._other_load[replica], self._resident[replica]
        self.load_buckets.drop(replica)

    def _update_load(self, replica: str) -> None:
        other_load = self._other_load.get(replica)
        if other_load is not None:
            self.load_buckets.set(replica, other_load + self._own_requests.get(replica, 0))

    def requests_outside(self, replicas: Collection[str]) -> int:
        """This gateway's requests in flight at replicas other than these, ready or not."""
        return sum(count for replica, count in self._own_requests.items() if replica not in replicas)

    # ---- queries of the policies --------------------------------------------------------------------------------------

    def adapter_presence(self, replica: str, adapter: str) -> float:
        """Presence of an adapter at a replica: 1 in a slot or requested by this gateway, `HOST_MEMORY_SHARE` in memory, or 0."""
        own_requests = self._own_by_adapter.get(adapter)
        if own_requests is not None and replica in own_requests:
            return 1.0
        if adapter not in self._resident.get(replica, ()):
            return 0.0
        slots = self._records[replica].slots
        return 1.0 if not slots or adapter in slots else HOST_MEMORY_SHARE

    def holders(self, adapter: str, limit: int) -> list[str]:
        """Replicas that have an adapter or are loading it: a random sample of at most `limit` of each kind."""
        resident = self._holders.get(adapter, ())
        replicas = list(resident) if len(resident) <= limit else self.sample(limit, resident)
        own_requests = self._own_by_adapter.get(adapter)
        if own_requests is not None:
            replicas += [
                replica for replica, _ in zip(own_requests, range(limit), strict=False) if replica not in replicas
            ]
        return replicas

    def sample(self, count: int, among: list[str] | tuple[str, ...] | None = None) -> list[str]:
        """`count` different random replicas, or all if there are fewer; `among` some, or all that are ready."""
        among = self._ready if among is None else among
        if len(among) <= count:
            return list(among)
        sample: list[str] = []
        while len(sample) < count:
            replica = among[int(self._rng.random() * len(among))]
            if replica not in sample:
                sample.append(replica)
        return sample

    def round_robin(self) -> Iterator[str]:
        """Each replica once, starting after the last one returned before."""
        for _ in range(len(self._ready)):
            self.next_turn += 1
            yield self._ready[self.next_turn % len(self._ready)]

    def least_loaded(self, replicas: Iterable[str], exclude: Collection[str] = ()) -> str | None:
        """The ready replica with the lowest load outside `exclude`; the first of equals."""
        best, lowest_load = None, 0
        for replica in replicas:
            load = self.load_buckets.get(replica)
            if load is not None and replica not in exclude and (best is None or load < lowest_load):
                best, lowest_load = replica, load
        return best
