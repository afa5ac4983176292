"""Consistent hashing of keys to replicas: gateways that know the same replicas agree without communication. Pure.

Karger et al. 1997: each replica owns points of a circle, and a key belongs to the next point; adding or removing a replica moves
only the keys next to its own points.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable

from tandem.routing.request import hash_key

POINTS_PER_REPLICA = 16
"""Points of each replica. More would balance the keys better, which spill-over to other replicas does anyway."""
MIX, MASK = 0x9E3779B97F4A7C15, 2**64 - 1


class HashRing:
    """Replica ids on a circle of 64-bit keys."""

    def __init__(self) -> None:
        self._points: list[int] = []
        self._owners: dict[int, str] = {}
        self._keys: dict[str, int] = {}

    def set(self, members: Collection[str]) -> None:
        """Replace the members; cheap if most stay."""
        new_members = set(members)
        removed, added = self._keys.keys() - new_members, new_members - self._keys.keys()
        if removed:
            self._owners = {point: owner for point, owner in self._owners.items() if owner not in removed}
            self._keys = {member: key for member, key in self._keys.items() if member not in removed}
        for member in added:
            self._keys[member] = hash_key(member)
            for number in range(POINTS_PER_REPLICA):
                self._owners[hash_key(f"{member}/{number}")] = member
        if removed or added:
            self._points = sorted(self._owners)

    def successors(self, key: int, count: int) -> list[str]:
        """The first `count` replicas after `key`, each once; fewer if there are no more."""
        successors: list[str] = []
        points, owners = self._points, self._owners
        start = bisect_left(points, key)
        for index in range(start, start + len(points)):
            owner = owners[points[index % len(points)]]
            if owner not in successors:
                successors.append(owner)
                if len(successors) == count:
                    break
        return successors

    def rendezvous(self, key: int, replicas: Iterable[str]) -> str:
        """The replica among some that a key belongs to (rendezvous hashing: Thaler, Ravishankar 1998)."""
        keys = self._keys
        return max(replicas, key=lambda replica: (keys.get(replica, 0) ^ key) * MIX & MASK)
