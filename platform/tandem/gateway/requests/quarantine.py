"""Quarantine of request bodies on which engines died: such a body may not take one replica after the other. Pure.

One gateway's memory: SHA-256 digests of routes and bodies, with the replicas that were lost while they had them. A replica's loss
says nothing about one request of many that it had, so one loss changes nothing for the client; the same body at a second lost
replica does. A whole answer clears a body.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable

REMEMBERED = 10_000
"""Bodies that are remembered; the oldest are dropped first."""


def body_digest(path: str, body: bytes) -> bytes:
    """The digest of a route and a body."""
    digest = hashlib.sha256(path.encode())
    digest.update(b"\0")
    digest.update(body)
    return digest.digest()


class Quarantine:
    """Bodies and the replicas that were lost with them."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`seconds`: how long a loss is remembered; 0: not at all."""
        self.seconds = seconds
        self._clock = clock
        self._lost: OrderedDict[bytes, tuple[float, frozenset[str]]] = OrderedDict()

    def replica_lost(self, digest: bytes, replica: str) -> None:
        """A replica was lost after it may have begun with a body."""
        if self.seconds <= 0 or not digest:
            return
        now = self._clock()
        self._lost[digest] = (now + self.seconds, self._replicas(digest, now) | {replica})
        self._lost.move_to_end(digest)
        while len(self._lost) > REMEMBERED or next(iter(self._lost.values()))[0] <= now:
            self._lost.popitem(last=False)

    def lost_replicas(self, digest: bytes) -> int:
        """Replicas that were lost with a body."""
        return len(self._replicas(digest, self._clock())) if self._lost else 0

    def answered(self, digest: bytes) -> None:
        """A body has been answered as a whole: it kills no engines."""
        if self._lost:
            self._lost.pop(digest, None)

    def _replicas(self, digest: bytes, now: float) -> frozenset[str]:
        expires_at, replicas = self._lost.get(digest, (0.0, frozenset()))
        return replicas if expires_at > now else frozenset()
