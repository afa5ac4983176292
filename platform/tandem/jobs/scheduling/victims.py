"""Choice of the runs that give way: the cheapest set that makes room for units of a job or for replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tandem.jobs.scheduling.decisions import Preempt, Shrink
from tandem.jobs.scheduling.pool import Pool
from tandem.jobs.scheduling.records import Placement, Run
from tandem.jobs.scheduling.reservation import difference
from tandem.jobs.scheduling.resources import Resources
from tandem.jobs.scheduling.state import ClusterState


@dataclass(frozen=True, kw_only=True, slots=True)
class Victim:
    """A run, and the workers that it keeps."""

    run: Run
    keep: Placement
    """Empty: it is stopped."""
    cost: tuple[float, ...]
    """Lower goes first: priority, whether its tenant is within its quota, whether it stops, lost GPU-seconds, start time."""

    @property
    def freed(self) -> Placement:
        """Workers that it gives up."""
        return difference(self.run.placement, self.keep)

    def decision(self, reason: str, *, for_job: str = "") -> Preempt | Shrink:
        """The decision that makes it give way."""
        if self.keep:
            return Shrink(job_id=self.run.job.id, placement=self.keep, reason=reason, for_job=for_job)
        return Preempt(job_id=self.run.job.id, reason=reason, for_job=for_job)


def candidates(
    state: ClusterState, now: float, may_shrink: Callable[[Run], bool], may_stop: Callable[[Run], bool]
) -> list[Victim]:
    """Runs that may give way, the cheapest first. One that may be shrunk and stopped is there twice, shrinking first.

    Runs that were started or resized within `min_run_s`, or told to stop or shrink, are left alone.
    """
    policy, found = state.policy, list[Victim]()
    within_quota = {name: account.held.fits_in(state.quota(name)) for name, account in state.accounts.items()}
    for run in state.runs.values():
        job = run.job
        if not job.preemptible or run.shrinking_to is not None or now - run.changed_s < policy.min_run_s:
            continue
        shrinks = job.is_elastic and run.workers > job.min_workers and may_shrink(run)
        stops = job.preemptions < policy.max_preemptions and may_stop(run)
        if not shrinks and not stops:
            continue
        lost_gpu_s = run.lost_gpu_s(policy, now)
        if shrinks:
            keep = shrunk(run, job.min_workers)
            cost = (job.priority, within_quota[job.tenant], False, lost_gpu_s, -run.started_s)
            found.append(Victim(run=run, keep=keep, cost=cost))
        if stops:
            cost = (job.priority, within_quota[job.tenant], True, lost_gpu_s, -run.started_s)
            found.append(Victim(run=run, keep=(), cost=cost))
    return sorted(found, key=lambda victim: (victim.cost, victim.run.job.id))


def choose(pool: Pool, unit: Resources, units: int, cheapest_first: Sequence[Victim]) -> list[Victim]:
    """Victims of which none can be left out, so that `units` fit into `pool`; empty if all are not enough."""
    fits = _Fit(pool, unit, units)
    if not fits(_last_of_each(cheapest_first)):
        return []
    low, high = 0, len(cheapest_first)
    while low < high:
        middle = (low + high) // 2
        if fits(_last_of_each(cheapest_first[:middle])):
            high = middle
        else:
            low = middle + 1
    chosen = _last_of_each(cheapest_first[:low])
    for victim in sorted(chosen, key=lambda victim: (victim.cost, victim.run.job.id), reverse=True):
        if victim not in chosen:
            continue
        others = [each for each in chosen if each is not victim]
        if fits(others):
            chosen = others
            continue
        # Give up as little as possible: nothing, fewer workers, or all.
        for keep in _smaller_sacrifices(victim):
            milder = [*others, Victim(run=victim.run, keep=keep, cost=victim.cost)]
            if fits(milder):
                chosen = milder
                break
    return sorted(chosen, key=lambda victim: victim.run.job.id)


def shrunk(run: Run, workers: int) -> Placement:
    """The placement of a run with fewer workers: those on the nodes where it has most stay."""
    kept, left = [], workers
    for node_id, count in sorted(run.placement, key=lambda entry: (-entry[1], entry[0])):
        if left:
            kept.append((node_id, min(count, left)))
            left -= min(count, left)
    return tuple(sorted(kept))


def _smaller_sacrifices(victim: Victim) -> Iterator[Placement]:
    run = victim.run
    kept = sum(count for _, count in victim.keep)
    for count in reversed(run.job.worker_counts):
        if victim.keep and kept < count < run.workers:
            yield shrunk(run, count)


def _last_of_each(victims: Sequence[Victim]) -> list[Victim]:
    # Of a run that is shrunk and stopped, the stop counts; it comes later.
    return list({victim.run.job.id: victim for victim in victims}.values())


class _Fit:
    """Whether a gang fits into a pool when victims have given way."""

    def __init__(self, pool: Pool, unit: Resources, units: int) -> None:
        self._pool = pool
        self._unit = unit
        self._units = units

    def __call__(self, victims: Sequence[Victim]) -> bool:
        pool = self._pool.copy()
        for victim in victims:
            pool.give_all(victim.freed, victim.run.job.worker)
        return pool.slots(self._unit) >= self._units
