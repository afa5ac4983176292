"""Health checks of training workers: hung, failed and slow ranks, found in their heartbeats. Pure.

A suspended rank sends no heartbeat. Its peers wait for it in a collective, but a separate thread keeps sending their heartbeats,
so the silent rank is the culprit. If every rank is heard and none makes progress, the ranks wait for each other.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tandem.config import FaultsConfig
from tandem.train.supervision.heartbeat import Heartbeat


@dataclass(frozen=True, kw_only=True, slots=True)
class Hang:
    """Ranks that make no progress."""

    ranks: tuple[int, ...]
    reason: str


def find_hang(heartbeats: Sequence[Heartbeat], config: FaultsConfig) -> Hang | None:
    """The ranks to kill: those without a heartbeat for hang_after_s, or all if none made progress for stuck_after_s."""
    active = [heartbeat for heartbeat in heartbeats if heartbeat.phase != "done"]
    silent = [heartbeat for heartbeat in active if heartbeat.since_heartbeat_s > config.hang_after_s]
    if silent:
        descriptions = ", ".join(f"rank {s.rank} (pid {s.pid}, {s.phase}, step {s.step})" for s in silent)
        longest_s = max(s.since_heartbeat_s for s in silent)
        return Hang(
            ranks=tuple(s.rank for s in silent), reason=f"{descriptions} sent no heartbeat for {longest_s:.0f} s"
        )
    if active and all(heartbeat.since_progress_s > config.stuck_after_s for heartbeat in active):
        shortest_s = min(s.since_progress_s for s in active)
        return Hang(
            ranks=tuple(s.rank for s in active),
            reason=f"none of {len(active)} ranks made progress for {shortest_s:.0f} s, in step {min(s.step for s in active)}",
        )
    return None


def find_culprit(failures: Mapping[int, str], died: Sequence[int], heartbeats: Sequence[Heartbeat]) -> tuple[int, str]:
    """The rank that caused a failure, and the reason. `failures`: Ray Train's error by rank, of which some `died`.

    A rank that loses a peer fails as well, and its error often arrives first. The culprit is the one that died, or ended without
    reporting an error, or reported its error first.
    """
    reported = sorted(
        (heartbeat for heartbeat in heartbeats if heartbeat.error), key=lambda heartbeat: -heartbeat.since_heartbeat_s
    )
    unreported = [heartbeat for heartbeat in heartbeats if heartbeat.phase != "done"]
    if died:
        return died[0], failures[died[0]]
    if reported and unreported:
        return unreported[0].rank, (
            f"its process ({unreported[0].pid}) ended without an error message, after its heartbeat in step "
            f"{unreported[0].step}; worker {reported[0].rank} reported: {reported[0].error}"
        )
    if reported:
        return reported[0].rank, reported[0].error
    return min(failures), failures[min(failures)]


def find_slow_ranks(heartbeats: Sequence[Heartbeat], factor: float) -> dict[int, str]:
    """Ranks that need more than `factor` times the median of the others, each with the reason."""
    slow_ranks: dict[int, str] = {}
    for key, task, least_s in (("compute_s", "to compute the same", 0.0), ("data_s", "for its rows", 0.05)):
        seconds_by_rank = {heartbeat.rank: float(getattr(heartbeat, key)) for heartbeat in heartbeats}
        if len(seconds_by_rank) < 2 or min(seconds_by_rank.values()) < 0 or not all(seconds_by_rank.values()):
            continue
        for rank, seconds in seconds_by_rank.items():
            # The median of the others: with two ranks, a median of both would lie between them.
            median = statistics.median(value for other_rank, value in seconds_by_rank.items() if other_rank != rank)
            if seconds > factor * median and seconds > least_s:
                slow_ranks.setdefault(
                    rank,
                    f"{1000 * seconds:.1f} ms {task}, {seconds / median:.1f} times the other ranks' {1000 * median:.1f}",
                )
    return slow_ranks
