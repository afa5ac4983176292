"""What a gateway remembers of where it sent requests: beginnings of texts, and sessions. Bounded; the longest unused goes first.

It is a guess at what the engines' prefix caches hold. A wrong one costs a prefill, so nobody is asked whether it is right.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

MAX_HOLDERS = 16
"""Replicas remembered for one beginning. One that more hold is found nearly everywhere, so there is little to gain by it."""


class PrefixHistory:
    """Which replicas have read a text that begins so."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._holders: OrderedDict[int, list[str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def record(self, prefix_hashes: Sequence[int], replica: str) -> None:
        """The replica reads a text with these beginnings now."""
        known = self._holders
        # The longest first, so that the shortest, which more texts share, is the last to be forgotten.
        for prefix_hash in reversed(prefix_hashes):
            holders = known.get(prefix_hash)
            if holders is None:
                known[prefix_hash] = [replica]
                continue
            known.move_to_end(prefix_hash)
            if holders[-1] != replica:
                if replica in holders:
                    holders.remove(replica)
                elif len(holders) >= MAX_HOLDERS:
                    del holders[0]
                holders.append(replica)
        while len(known) > self._capacity:
            known.popitem(last=False)

    def longest_matches(self, prefix_hashes: Sequence[int], limit: int) -> dict[str, int]:
        """At most `limit` replicas, each with its number of matching `prefix_hashes`; longest match first, then most recent."""
        found: dict[str, int] = {}
        for depth in range(len(prefix_hashes), 0, -1):
            holders = self._holders.get(prefix_hashes[depth - 1])
            if holders is None:
                continue
            for replica in reversed(holders):
                if replica not in found:
                    found[replica] = depth
                    if len(found) == limit:
                        return found
        return found


class SessionHistory:
    """Which replica had a session's last request."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._replicas: OrderedDict[int, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._replicas)

    def record(self, session: int, replica: str) -> None:
        """The session is there now."""
        self._replicas[session] = replica
        self._replicas.move_to_end(session)
        if len(self._replicas) > self._capacity:
            self._replicas.popitem(last=False)

    def get(self, session: int) -> str | None:
        """Where it was last."""
        return self._replicas.get(session)
