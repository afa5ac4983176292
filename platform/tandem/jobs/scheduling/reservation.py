"""Reservation of the first job that does not fit: when and where it starts at the latest (EASY backfill; Lifka, JSSPP 1995).

Runs end at their time limits or before. Other jobs may start meanwhile if they end before the reservation, or leave its
resources alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from tandem.jobs.scheduling.pool import Pool
from tandem.jobs.scheduling.queues import Shape
from tandem.jobs.scheduling.records import Job, Placement
from tandem.jobs.scheduling.resources import Resources
from tandem.jobs.scheduling.state import ClusterState

Release = tuple[float, Placement, Resources]
"""A time, workers that are gone then, and the resources of one of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """Resources kept for a job from a time on."""

    job: Job
    start_s: float
    beyond: Pool
    """What is not reserved from `start_s` on."""
    lasting: Pool
    """What jobs may take that outlast `start_s`: on each node, what is free both now and beyond `start_s`."""

    def take(self, node_id: str, amount: Resources, free: Pool, *, outlasts: bool) -> None:
        """Count a job in that starts now with an amount of `free`, from which it is taken already."""
        if outlasts:
            self.beyond.take(node_id, amount)
        least = free.free(node_id).least(self.beyond.free(node_id))
        self.lasting.take(node_id, self.lasting.free(node_id) - least)


def reserve(free: Pool, ordered_releases: Iterable[Release], job: Job, shape: Shape, now: float) -> Reservation | None:
    """The earliest time at which `job` fits, as runs end one after the other; None if it fits at no time."""
    later = free.copy()
    for end_s, placement, worker in ordered_releases:
        later.give_all(placement, worker)
        if later.slots(shape.unit) >= shape.units:
            units = later.pack(shape.unit, shape.units)
            assert units is not None
            for node_id, count in units.items():
                later.take(node_id, shape.unit * count)
            return Reservation(job=job, start_s=max(now, end_s), beyond=later, lasting=free.least(later))
    return None


def releases(
    state: ClusterState, now: float, giving_way: Mapping[str, Placement], starting: Iterable[Release]
) -> Iterator[Release]:
    """What runs release, in the order of time.

    `giving_way`: runs that are told to give way now, with the placement that each keeps. `starting`: releases of jobs that start
    now.
    """
    drained_s = now + state.policy.drain_s
    early = list(starting)
    shrunk = {job_id: run.shrinking_to for job_id, run in state.runs.items() if run.shrinking_to is not None}
    shrunk.update(giving_way)
    for job_id, keep in shrunk.items():
        run = state.runs[job_id]
        given_s = drained_s if keep else min(drained_s, max(now, run.ends_s(state.policy)))
        early.append((given_s, difference(run.placement, keep), run.job.worker))

    def at_their_ends() -> Iterator[Release]:
        for end_s, job_id in state.ends:
            run = state.runs[job_id]
            yield end_s, shrunk.get(job_id, run.placement), run.job.worker

    return heapq.merge(sorted(early, key=_time), at_their_ends(), key=_time)


def difference(placement: Placement, keep: Placement) -> Placement:
    """The workers of `placement` that are not in `keep`."""
    keeps = dict(keep)
    return tuple((node, count - keeps.get(node, 0)) for node, count in placement if count > keeps.get(node, 0))


def _time(release: Release) -> float:
    return release[0]
