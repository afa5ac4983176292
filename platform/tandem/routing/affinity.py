"""Replicas to which a gateway has sent prompt prefixes and sessions: bounded histories, least recently used dropped first.

They estimate the contents of the engines' prefix caches. A wrong estimate costs one prefill, so engines are not asked.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

MAX_HOLDERS = 16
"""Replicas remembered for one prefix; a prefix that more replicas hold gives little reason to prefer one of them."""


class PrefixHistory:
    """Replicas that have read a text with a given prefix, by the prefix's hash."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._holders: OrderedDict[int, list[str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def record(self, prefix_hashes: Sequence[int], replica: str) -> None:
        """A replica has been sent a text with these prefixes."""
        holders_by_hash = self._holders
        # The longest first: the shortest prefix, which more texts share, is then the last to be dropped.
        for prefix_hash in reversed(prefix_hashes):
            holders = holders_by_hash.get(prefix_hash)
            if holders is None:
                holders_by_hash[prefix_hash] = [replica]
                continue
            holders_by_hash.move_to_end(prefix_hash)
            if holders[-1] != replica:
                if replica in holders:
                    holders.remove(replica)
                elif len(holders) >= MAX_HOLDERS:
                    del holders[0]
                holders.append(replica)
        while len(holders_by_hash) > self._capacity:
            holders_by_hash.popitem(last=False)

    def longest_matches(self, prefix_hashes: Sequence[int], limit: int) -> dict[str, int]:
        """At most `limit` replicas, each with its number of matching `prefix_hashes`; longest match first, then most recent."""
        matches: dict[str, int] = {}
        for depth in range(len(prefix_hashes), 0, -1):
            holders = self._holders.get(prefix_hashes[depth - 1])
            if holders is None:
                continue
            for replica in reversed(holders):
                if replica not in matches:
                    matches[replica] = depth
                    if len(matches) == limit:
                        return matches
        return matches


class SessionHistory:
    """Replica that got the last request of each session."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._replicas: OrderedDict[int, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._replicas)

    def record(self, session: int, replica: str) -> None:
        """A session's request has been sent to a replica."""
        self._replicas[session] = replica
        self._replicas.move_to_end(session)
        if len(self._replicas) > self._capacity:
            self._replicas.popitem(last=False)

    def get(self, session: int) -> str | None:
        """The replica of the session's last request; None: not remembered."""
        return self._replicas.get(session)
