"""Preemption rules: the workers that the first waiting job may take from running jobs.

- Workers above an elastic run's fewest, from runs of no higher priority.
- Within its tenant's quota: whole runs of tenants that hold more than theirs, as far as these exceed it (reclaim).
- Whole runs of its own tenant of lower priority.
"""

from __future__ import annotations

from collections.abc import Mapping

from tandem.jobs.scheduling.pool import Pool
from tandem.jobs.scheduling.records import Job, Placement, Run
from tandem.jobs.scheduling.reservation import difference
from tandem.jobs.scheduling.resources import Resources
from tandem.jobs.scheduling.state import ClusterState
from tandem.jobs.scheduling.victims import Victim, candidates, choose


def victims_for(
    state: ClusterState, free: Pool, job: Job, giving_way: Mapping[str, Placement], now: float, *, is_within_quota: bool
) -> list[Victim]:
    """The cheapest runs that make room for `job`; empty if it has to wait, or if runs that leave already make room.

    `giving_way`: runs that are told to give way in this decision, with the placement that each keeps.
    """
    if now - job.submitted_s < state.policy.preempt_after_s:
        return []
    unit, units = job.unit, job.min_workers // job.workers_per_node
    released = free.copy()
    for run in state.runs.values():
        keep = giving_way.get(run.job.id, run.shrinking_to)
        if keep is not None:
            released.give_all(difference(run.placement, keep), run.job.worker)
    if released.slots(unit) >= units:
        return []
    held = _settled(state, now)
    over_quota = {name for name, amount in held.items() if not amount.fits_in(state.quota(name))}

    def is_borrowed(run: Run) -> bool:
        return is_within_quota and run.job.tenant in over_quota and run.job.tenant != job.tenant

    def may_shrink(run: Run) -> bool:
        return run.job.id not in giving_way and (run.job.priority <= job.priority or is_borrowed(run))

    def may_stop(run: Run) -> bool:
        is_own_lower = run.job.tenant == job.tenant and run.job.priority < job.priority
        return run.job.id not in giving_way and (is_own_lower or is_borrowed(run))

    found = _within_excess(state, job, held, candidates(state, now, may_shrink, may_stop))
    if not _may_suffice(released, found, job):
        return []
    return choose(released, unit, units, found)


def _settled(state: ClusterState, now: float) -> dict[str, Resources]:
    """What tenants hold with runs that may be stopped by now: a fresh start makes no older run of its tenant stop."""
    held = {name: account.held for name, account in state.accounts.items()}
    for run in state.runs.values():
        if now - run.changed_s < state.policy.min_run_s:
            held[run.job.tenant] = held[run.job.tenant] - run.job.needs(run.workers)
    return held


def _within_excess(
    state: ClusterState, job: Job, held: dict[str, Resources], cheapest_first: list[Victim]
) -> list[Victim]:
    """Leave out runs of other tenants that would be stopped although their tenant is within its quota by then."""
    held = dict(held)
    chosen, shrunk = [], dict[str, int]()
    for victim in cheapest_first:
        run, tenant = victim.run, victim.run.job.tenant
        if not victim.keep and tenant != job.tenant and held[tenant].fits_in(state.quota(tenant)):
            continue
        kept = sum(workers for _, workers in victim.keep)
        held[tenant] = held[tenant] - run.job.worker * (shrunk.get(run.job.id, run.workers) - kept)
        shrunk[run.job.id] = kept
        chosen.append(victim)
    return chosen


def _may_suffice(released: Pool, victims: list[Victim], job: Job) -> bool:
    """Whether the totals would do, wherever they are; saves looking at nodes."""
    whole = {victim.run.job.id: victim for victim in victims}
    total = Resources(float(released.cpus.clip(min=0).sum()), float(released.gpus.clip(min=0).sum()))
    for victim in whole.values():
        kept = sum(workers for _, workers in victim.keep)
        total = total + victim.run.job.worker * (victim.run.workers - kept)
    return job.needs().fits_in(total)
