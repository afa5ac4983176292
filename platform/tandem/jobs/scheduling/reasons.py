"""Reasons of decisions, for the people whose jobs wait, stop or give way: the fact, the numbers, the next step.

A tenant reads the reasons of its own jobs. They name no other tenant, and no job of one.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from tandem.jobs.scheduling.pool import Pool
from tandem.jobs.scheduling.records import Job, Policy, Tenant
from tandem.jobs.scheduling.resources import Resources


def clock(time_s: float) -> str:
    """A time for people."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


def duration(seconds: float) -> str:
    """A duration for people, such as `1 day, 2:00:00`."""
    return str(timedelta(seconds=round(seconds)))


def amount(resources: Resources) -> str:
    """GPUs, where there are any, else CPUs: what a user thinks of as the size of a job."""
    count, name = (resources.gpus, "GPU") if resources.gpus else (resources.cpus, "CPU")
    return f"{count:g} {name if count == 1 else name + 's'}"


def named(other: Job, job: Job) -> str:
    """Another job, in a reason of `job`."""
    return f"job {other.id}" if other.tenant == job.tenant else "a job of another tenant"


def needed(job: Job) -> str:
    """The least that a job needs."""
    return amount(job.needs())


def usable(free: Pool, job: Job) -> str:
    """What a job could take of the free resources: groups of workers that each find CPUs and GPUs on one node."""
    count = (job.unit.gpus or job.unit.cpus) * free.slots(job.unit)
    return f"{count:g} {'is' if count == 1 else 'are'} free for it"


def waits(free: Pool, job: Job, expected_s: float) -> str:
    """Of the first job that does not fit."""
    return f"waits for {needed(job)}; {usable(free, job)}, enough by {clock(expected_s)} at the latest"


def no_end_in_sight(free: Pool, job: Job) -> str:
    """Of a job in whose way is what never ends."""
    return (
        f"waits for {needed(job)}; {usable(free, job)}, and serving holds the rest for as long as it needs it. "
        "Add a node, or let the job run with fewer workers"
    )


def behind(free: Pool, job: Job, first: Job) -> str:
    """Of a job that does not fit, and is not the first."""
    return f"waits for {needed(job)}; {usable(free, job)}, and {named(first, job)} is before it"


def in_line(ahead: int, tenant: str) -> str:
    """Of a job behind `ahead` others of its tenant; empty: of no tenant."""
    return f"waits behind {ahead} job{'' if ahead == 1 else 's'}" + (f" of tenant {tenant}" if tenant else "")


def would_delay(job: Job, policy: Policy, first: Job, start_s: float) -> str:
    """Of a job that fits now, in the way of the first. The text stays the same while nothing happens: it is written to rows."""
    limit = "its time limit" if job.time_limit_s is not None else "the default time limit"
    return (
        f"waits though {needed(job)} are free: by {limit} of {duration(job.expected_s(policy))} it may run beyond "
        f"{clock(start_s)}, when {named(first, job)} gets them. A time limit that ends by then would let it start now"
    )


def too_large(capacity: Pool, job: Job) -> str:
    """Of a job that no empty cluster holds."""
    group = "" if job.workers_per_node == 1 else f", in groups of {job.workers_per_node} workers on one node"
    return (
        f"needs {needed(job)}{group}; in an empty cluster {usable(capacity, job)}. "
        "Add nodes, or let the job run with fewer workers"
    )


def over_tenant_limit(tenant: Tenant, held: Resources, job: Job) -> str:
    """Of a job that its tenant's limit holds back."""
    limits = ((tenant.limit_gpus, "GPUs"), (tenant.limit_cpus, "CPUs"))
    limit = " and ".join(f"{most:g} {name}" for most, name in limits if most is not None)
    return (
        f"needs {job.needs()}; tenant {tenant.name} holds {held}, and its limit is {limit}. "
        "It waits until the tenant's other jobs end"
    )


def over_limit(job: Job) -> str:
    """Of a job that is stopped."""
    return (
        f"reached its time limit of {duration(job.time_limit_s or 0.0)}. Submit it again with a higher limit to go on"
    )


def beside(job: Job, first: Job) -> str:
    """Of a job that starts before the first, which does not fit."""
    return f"fits beside {named(first, job)} without delaying it"


def gives_way(job: Job, to: Job) -> str:
    """Of a run that gives way to another job."""
    return f"gives way to {named(to, job)}, priority {to.priority}"
