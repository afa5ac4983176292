"""The ready replicas of one base, indexed so that no decision looks at all of them. Pure.

A heartbeat costs a few dictionary entries; so does a request that begins or ends. The index of consistent hashing is made
anew only when replicas come or go.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from tandem.routing.hash_ring import Ring
from tandem.routing.records import ReplicaRecord

WAITING_REQUESTS = 2
"""What a waiting request counts for beyond itself: where one waits, there is no room for the next."""
FULL_KV = 0.9
"""Share of the KV cache above which a replica is about to preempt what runs."""
FULL_KV_REQUESTS = 16
"""What a cache that is wholly in use counts for, in requests; above `FULL_KV` in proportion."""
IN_MEMORY = 0.5
"""How much it is worth that an adapter lies in a replica's memory, and is not in a slot: it may have to wait for one."""


class Levels:
    """Replicas by how much work they have: the idlest in constant time, and a change of work too."""

    def __init__(self) -> None:
        self._work: dict[str, int] = {}
        self._place: dict[str, int] = {}
        self._levels: dict[int, list[str]] = {}
        self._least = 0
        self._total = 0

    def __contains__(self, replica: str) -> bool:
        return replica in self._work

    def get(self, replica: str) -> int | None:
        """Its work, or None if it is not here."""
        return self._work.get(replica)

    def set(self, replica: str, work: int) -> None:
        """Put a replica, or move it."""
        before = self._work.get(replica)
        if before == work:
            return
        if before is not None:
            self._take_out(replica, before)
        level = self._levels.get(work)
        if level is None:
            level = self._levels[work] = []
        self._place[replica] = len(level)
        level.append(replica)
        self._work[replica] = work
        self._total += work - (before or 0)
        if work < self._least or self._least not in self._levels:
            self._least = work if before is None or work <= before else min(self._levels)

    def drop(self, replica: str) -> None:
        """Forget a replica."""
        work = self._work.pop(replica, None)
        if work is not None:
            self._total -= work
            self._take_out(replica, work)
            if self._levels and self._least not in self._levels:
                self._least = min(self._levels)

    def mean(self) -> float:
        """The work of one, on average."""
        return self._total / len(self._work) if self._work else 0.0

    def spread(self) -> int:
        """How much more work the busiest has than the idlest."""
        return max(self._levels) - min(self._levels) if self._levels else 0

    def idlest(self, dice: random.Random, avoid: Collection[str] = ()) -> str | None:
        """One of those with the least work, at random; of those not to `avoid`, if there are any."""
        if not self._levels:
            return None
        level = self._levels[self._least]
        found = level[int(dice.random() * len(level))]
        if found not in avoid:
            return found
        for work in sorted(self._levels):
            left = [replica for replica in self._levels[work] if replica not in avoid]
            if left:
                return left[int(dice.random() * len(left))]
        return None

    def _take_out(self, replica: str, work: int) -> None:
        level, place = self._levels[work], self._place[replica]
        last = level.pop()
        if last != replica:
            level[place] = last
            self._place[last] = place
        elif not level:
            del self._levels[work]


class Pool:
    """The replicas of one base that are ready, with their loads and adapters as far as this gateway knows."""

    def __init__(self, dice: random.Random) -> None:
        self.levels = Levels()
        self.ring = Ring()
        self.turn = dice.getrandbits(16)
        """Of those that are asked in turn, the next; gateways start at different ones."""
        self._dice = dice
        self._ready: list[str] = []
        self._place: dict[str, int] = {}
        self._records: dict[str, ReplicaRecord] = {}
        self._elsewhere: dict[str, int] = {}
        self._own: Counter[str] = Counter()
        self._carried: dict[str, Counter[str]] = {}
        self._resident: dict[str, set[str]] = {}
        self._holders: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return len(self._ready)

    def __contains__(self, replica: str) -> bool:
        return replica in self._place

    @property
    def ready(self) -> list[str]:
        """Ids, in no order that means anything."""
        return self._ready

    def record(self, replica: str) -> ReplicaRecord:
        """The replica as it last described itself."""
        return self._records[replica]

    # ---- what is learnt -----------------------------------------------------------------------------------------------

    def take(self, records: Iterable[ReplicaRecord]) -> None:
        """These are all the replicas of the base now."""
        seen = set()
        came = False
        for record in records:
            if record.state == "ready":
                seen.add(record.id)
                came |= record.id not in self._place
                self._put(record)
        gone = self._place.keys() - seen
        for replica in gone:
            self._drop(replica)
        if came or gone:
            self.ring.set(self._ready)

    def began(self, replica: str, adapter: str | None) -> None:
        """A request of this gateway's own is on its way to a replica."""
        self._own[replica] += 1
        if adapter is not None:
            self._carried.setdefault(adapter, Counter())[replica] += 1
        self._weigh(replica)

    def ended(self, replica: str, adapter: str | None) -> None:
        """It is over."""
        self._own[replica] -= 1
        if not self._own[replica]:
            del self._own[replica]
        if adapter is not None:
            carried = self._carried[adapter]
            carried[replica] -= 1
            if not carried[replica]:
                del carried[replica]
                if not carried:
                    del self._carried[adapter]
        self._weigh(replica)

    def loaded(self, replica: str, adapter: str) -> None:
        """A replica has answered for an adapter, so it holds it, until it says which it holds."""
        resident = self._resident.get(replica)
        if resident is not None and adapter not in resident:
            resident.add(adapter)
            self._holders.setdefault(adapter, []).append(replica)

    def _put(self, record: ReplicaRecord) -> None:
        replica = record.id
        if replica not in self._place:
            self._place[replica] = len(self._ready)
            self._ready.append(replica)
            self._resident[replica] = set()
        self._records[replica] = record
        # What it reports has this gateway's requests in it. Those are counted here, to the moment; the rest are others'.
        own = self._own.get(replica, 0)
        rest = record.waiting * WAITING_REQUESTS
        if record.running + record.waiting > own:
            rest += record.running + record.waiting - own
        if record.kv_usage > FULL_KV:
            rest += int((record.kv_usage - FULL_KV) / (1 - FULL_KV) * FULL_KV_REQUESTS)
        self._elsewhere[replica] = rest
        self.levels.set(replica, rest + own)
        resident = self._resident[replica]
        if len(resident) != len(record.adapters) or not resident.issuperset(record.adapters):
            self._hold(replica, set(record.adapters))

    def _hold(self, replica: str, adapters: set[str]) -> None:
        before = self._resident[replica]
        for adapter in before - adapters:
            holders = self._holders[adapter]
            holders.remove(replica)
            if not holders:
                del self._holders[adapter]
        for adapter in adapters - before:
            self._holders.setdefault(adapter, []).append(replica)
        self._resident[replica] = adapters

    def _drop(self, replica: str) -> None:
        self._hold(replica, set())
        place, last = self._place.pop(replica), self._ready.pop()
        if last != replica:
            self._ready[place] = last
            self._place[last] = place
        del self._records[replica], self._elsewhere[replica], self._resident[replica]
        self.levels.drop(replica)

    def _weigh(self, replica: str) -> None:
        rest = self._elsewhere.get(replica)
        if rest is not None:
            self.levels.set(replica, rest + self._own.get(replica, 0))

    def carried_by_others(self, replicas: Collection[str]) -> int:
        """This gateway's own requests in flight at all but these, ready or not."""
        return sum(count for replica, count in self._own.items() if replica not in replicas)

    # ---- what policies ask --------------------------------------------------------------------------------------------

    def held(self, replica: str, adapter: str) -> float:
        """How much of an adapter a replica has: 1 in a slot, or soon for a request of this gateway's; less in memory."""
        carried = self._carried.get(adapter)
        if carried is not None and replica in carried:
            return 1.0
        if adapter not in self._resident.get(replica, ()):
            return 0.0
        slots = self._records[replica].slots
        return 1.0 if not slots or adapter in slots else IN_MEMORY

    def holders(self, adapter: str, most: int) -> list[str]:
        """Replicas that have an adapter, or are loading it: `most` at most of each, at random."""
        held = self._holders.get(adapter, ())
        found = list(held) if len(held) <= most else self.some(most, held)
        carried = self._carried.get(adapter)
        if carried is not None:
            found += [replica for replica, _ in zip(carried, range(most), strict=False) if replica not in found]
        return found

    def some(self, count: int, among: list[str] | tuple[str, ...] | None = None) -> list[str]:
        """`count` different replicas at random, or all if there are no more; `among` those given, or all that are ready."""
        among = self._ready if among is None else among
        if len(among) <= count:
            return list(among)
        found: list[str] = []
        while len(found) < count:
            replica = among[int(self._dice.random() * len(among))]
            if replica not in found:
                found.append(replica)
        return found

    def in_turn(self) -> Iterator[str]:
        """Each replica once, from the one whose turn it is."""
        for _ in range(len(self._ready)):
            self.turn += 1
            yield self._ready[self.turn % len(self._ready)]

    def least(self, replicas: Iterable[str], avoid: Collection[str] = ()) -> str | None:
        """The one with the least work of those that are ready and not to avoid; the first of equals."""
        best, least = None, 0
        for replica in replicas:
            work = self.levels.get(replica)
            if work is not None and replica not in avoid and (best is None or work < least):
                best, least = replica, work
        return best
