"""Ejected replicas: those that failed this gateway's requests, and for how long they get none. Pure.

One incident counts once, however many requests it broke. Each further incident without an answer in between doubles the ejection,
up to `LONGEST_EJECTION_S`; a probe at its end decides whether the replica returns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

FIRST_EJECTION_S = 3.0
"""Seconds for which a replica gets no requests after its first failure, unless it answers one before."""
LONGEST_EJECTION_S = 60.0
"""Longest ejection, in seconds."""


@dataclass(slots=True)
class Suspects:
    """Ejected replicas by id, and the failures of those that have not answered since."""

    ejected: set[str] = field(default_factory=set)
    failures: dict[str, int] = field(default_factory=dict)

    def suspect(self, replica: str) -> float | None:
        """A replica failed a request: seconds of its ejection; None: it is ejected already."""
        return None if replica in self.ejected else self._eject(replica)

    def probe_failed(self, replica: str) -> float | None:
        """The probe at the end of an ejection failed: seconds of the next one; None: it is not ejected any more."""
        return self._eject(replica) if replica in self.ejected else None

    def readmit(self, replica: str) -> bool:
        """The probe succeeded: the replica gets requests, and its failures still count. Returns whether it was ejected."""
        was_ejected = replica in self.ejected
        self.ejected.discard(replica)
        return was_ejected

    def answered(self, replica: str) -> bool:
        """The replica answered a request: it is no suspect any more. Returns whether it was ejected."""
        self.failures.pop(replica, None)
        return self.readmit(replica)

    def forget(self, replicas: Iterable[str]) -> None:
        """Replicas that are gone."""
        for replica in replicas:
            self.answered(replica)

    def _eject(self, replica: str) -> float:
        self.ejected.add(replica)
        count = self.failures[replica] = self.failures.get(replica, 0) + 1
        return min(LONGEST_EJECTION_S, FIRST_EJECTION_S * 2.0 ** min(count - 1, 10))
