"""Chooses the replica for a request. Pure: callers pass the directory's snapshot, their own counts and the dice."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping

from tandem.serve.records import ReplicaRecord, Snapshot

SPILL_REQUESTS = 16
"""How many more requests a replica may have than the idlest before its adapter is loaded elsewhere too."""


def choose(
    snapshot: Snapshot,
    base: str,
    *,
    adapter: str | None = None,
    in_flight: Mapping[str, int] | None = None,
    avoid: Collection[str] = (),
    dice: random.Random | None = None,
) -> ReplicaRecord | None:
    """The replica of `base` with the least work, or None if none is ready.

    Work is what the replica reported plus what this gateway has `in_flight` there. One that holds `adapter` comes first,
    unless it is `SPILL_REQUESTS` busier than the idlest. Replicas to `avoid` are left out. Ties are broken at random.
    """
    ready = [r for r in snapshot.replicas if r.base == base and r.state == "ready" and r.id not in avoid]
    if not ready:
        return None
    own = in_flight or {}
    work = {r.id: r.load + own.get(r.id, 0) for r in ready}
    if adapter is not None:
        limit = min(work.values()) + SPILL_REQUESTS
        ready = [r for r in ready if adapter in r.adapters and work[r.id] <= limit] or ready
    least = min(work[r.id] for r in ready)
    idlest = [r for r in ready if work[r.id] == least]
    return (dice or random).choice(idlest)
