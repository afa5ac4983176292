"""Consistent hashing: which replicas a key is at home at. Gateways that know the same replicas agree without a word. Pure.

Karger et al. 1997: each replica owns some points of a circle, and a key belongs to the next point; a replica that comes or
goes moves only the keys next to its own points.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection

from tandem.serve.ask import key_of

POINTS = 16
"""Points of each replica. More would even out how many keys each is home to, which spill-over does anyway."""


class Ring:
    """Replica ids on a circle of 64-bit keys."""

    def __init__(self) -> None:
        self._points: list[int] = []
        self._owners: dict[int, str] = {}
        self._members: set[str] = set()

    def set(self, members: Collection[str]) -> None:
        """Take `members` as all there are. Cheap if most were here before."""
        wanted = set(members)
        gone, new = self._members - wanted, wanted - self._members
        if gone:
            self._owners = {point: owner for point, owner in self._owners.items() if owner not in gone}
        for member in new:
            for number in range(POINTS):
                self._owners[key_of(f"{member}/{number}")] = member
        if gone or new:
            self._points = sorted(self._owners)
            self._members = wanted

    def homes(self, key: int, count: int) -> list[str]:
        """The first `count` replicas after `key`, each once; fewer if there are no more."""
        found: list[str] = []
        points, owners = self._points, self._owners
        first = bisect_left(points, key)
        for index in range(first, first + len(points)):
            owner = owners[points[index % len(points)]]
            if owner not in found:
                found.append(owner)
                if len(found) == count:
                    break
        return found
