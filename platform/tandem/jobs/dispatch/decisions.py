"""Decisions about what starts: their types, and the simplest decider, in order of priority and submission. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from tandem.jobs.scheduling.records import ServingDemand
from tandem.jobs.scheduling.resources import Resources as Amounts
from tandem.jobs.work.records import Job, Resources


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeAmounts:
    """CPUs and GPUs of one node."""

    id: str
    total: Amounts
    free: Amounts
    is_placeable: bool = True
    """Whether new work may be placed there: it is not cordoned, and does not leave."""
    node_type: str = ""
    """Of the nodes that are like it; empty: the cluster does not name any."""
    serving: Amounts = field(default_factory=Amounts)
    """What replicas of served models hold of it; `free` is without that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What a cluster has for jobs, what they hold included."""

    cpus: float
    gpus: float = 0.0
    nodes: tuple[NodeAmounts, ...] = ()
    """All nodes that are alive. Deciders that place jobs on nodes need them."""
    pending_replicas: tuple[ServingDemand, ...] = ()
    """Replicas that Serve wants and has no room for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Start a job that waits, with a number of workers."""

    job_id: str
    workers: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Preempt:
    """Let a job that runs save and leave, to wait again."""

    job_id: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Resize:
    """Let a job that runs save and leave, and go on with another number of workers."""

    job_id: str
    workers: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Expire:
    """End a job whose time limit is reached; it saves and leaves."""

    job_id: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Wait:
    """Leave a job in the queue."""

    job_id: str
    reason: str
    """For people."""


Decision = Start | Preempt | Resize | Expire | Wait
AskCapacity = Callable[[], Capacity]
"""The capacity of the cluster; of several calls for one decision the first asks the cluster."""
Decide = Callable[[Sequence[Job], Sequence[Job], AskCapacity, datetime], Sequence[Decision]]
"""(waiting, running, ask for the capacity, now) -> decisions. Jobs that wait come most urgent first."""


def first_come_first_served(
    waiting: Sequence[Job], running: Sequence[Job], ask_capacity: AskCapacity, now: datetime
) -> list[Decision]:
    """Start jobs in their order, with as many workers as fit. The first that has to wait keeps those behind it waiting too, so
    that a large job is not passed for ever; one that the whole cluster could not hold delays nobody.
    """
    if not waiting:
        return []
    capacity = ask_capacity()
    decisions: list[Decision] = []
    free_cpus = capacity.cpus - sum(job.resources.cpus_per_worker * (job.workers or 1) for job in running)
    free_gpus = capacity.gpus - sum(job.resources.gpus_per_worker * (job.workers or 1) for job in running)
    blocked_by: Job | None = None
    for job in waiting:
        need = job.resources
        if _workers_that_fit(need, capacity.cpus, capacity.gpus) < need.min_workers:
            decisions.append(
                Wait(
                    job_id=job.id,
                    reason=f"needs {_amount(need)}; the cluster has {_shown(capacity.cpus, capacity.gpus)}",
                )
            )
        elif blocked_by is not None:
            # A tenant reads the reason, and learns nothing of others by it.
            ahead = blocked_by.id if blocked_by.tenant == job.tenant else "a job of another tenant"
            decisions.append(Wait(job_id=job.id, reason=f"waits behind {ahead}"))
        elif (workers := _workers_that_fit(need, free_cpus, free_gpus)) < need.min_workers:
            decisions.append(
                Wait(job_id=job.id, reason=f"waits for {_amount(need)}; {_shown(free_cpus, free_gpus)} are free")
            )
            blocked_by = job
        else:
            decisions.append(Start(job_id=job.id, workers=workers))
            free_cpus -= need.cpus_per_worker * workers
            free_gpus -= need.gpus_per_worker * workers
    return decisions


def _workers_that_fit(need: Resources, cpus: float, gpus: float) -> int:
    """Workers, `max_workers` at most."""
    fits = float(need.max_workers)
    if need.cpus_per_worker > 0:
        fits = min(fits, cpus / need.cpus_per_worker)
    if need.gpus_per_worker > 0:
        fits = min(fits, gpus / need.gpus_per_worker)
    # 0.3 / 0.1 is a little less than 3.
    return max(0, int(fits + 1e-9))


def _amount(need: Resources) -> str:
    return _shown(need.cpus_per_worker * need.min_workers, need.gpus_per_worker * need.min_workers)


def _shown(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPUs and {gpus:g} GPUs"
