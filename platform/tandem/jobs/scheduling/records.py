"""Records of the scheduler: tenants, nodes, jobs, runs, serving demand, and the policy's settings. Plain data.

Times are seconds on one clock that the caller chooses; durations are seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tandem.jobs.scheduling.resources import Resources

Placement = tuple[tuple[str, int], ...]
"""Workers on each node: (node id, workers), sorted by node id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """Settings of the scheduler."""

    half_life_s: float = 24 * 3600.0
    """Time after which past use of the cluster counts half in a tenant's fair share."""
    default_time_limit_s: float = 24 * 3600.0
    """Run time of a job that has neither a time limit nor an estimate: for reservations only, it is not enforced."""
    aging_s: float = 6 * 3600.0
    """Waiting time that raises a job by one priority level among its tenant's jobs."""
    starvation_s: float = 24 * 3600.0
    """Time as the first of its tenant's jobs after which a job precedes all others and other tenants' quotas."""
    min_run_s: float = 600.0
    """Run time, since its start or last resize, before a run is preempted or resized."""
    max_preemptions: int = 3
    """Preemptions after which a job is not preempted any more."""
    preempt_after_s: float = 300.0
    """Waiting time before a job preempts others. Serving does not wait."""
    restart_s: float = 60.0
    """Time that a run loses when it is stopped and started again, beside its checkpoint."""
    drain_s: float = 120.0
    """Expected time from the decision to stop or shrink a run until its resources are free."""
    give_back_s: float = 300.0
    """Time for which a replica must not have been needed before its resources go back to training."""
    backfill_depth: int = 500
    """Waiting jobs that one decision examines after the first that does not fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenant:
    """A tenant's rights."""

    name: str
    weight: float = 1.0
    """Relative claim to the cluster where tenants compete."""
    quota_cpus: float | None = None
    """CPUs that the tenant gets back from borrowers; unset: its share by weight."""
    quota_gpus: float | None = None
    limit_cpus: float | None = None
    """CPUs that the tenant never exceeds, borrowed ones included; unset: no limit."""
    limit_gpus: float | None = None

    @property
    def limit(self) -> Resources:
        """The limits, infinite where unset."""
        return Resources(
            math.inf if self.limit_cpus is None else self.limit_cpus,
            math.inf if self.limit_gpus is None else self.limit_gpus,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A node that work may be placed on."""

    id: str
    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A job that wants workers, all at once or not at all."""

    id: str
    tenant: str
    worker: Resources
    """Of one worker."""
    worker_counts: tuple[int, ...] = (1,)
    """Possible numbers of workers, ascending; several: the run is elastic."""
    workers_per_node: int = 1
    """Workers come in groups of so many that share a node, such as the tensor-parallel degree."""
    priority: int = 0
    """Level of its priority class; higher first."""
    submitted_s: float
    time_limit_s: float | None = None
    """Run time, over all restarts, after which the job is stopped."""
    estimate_s: float | None = None
    """Expected run time where there is no time limit; not enforced."""
    preemptible: bool = True
    """Whether it may be stopped, or shrunk, for others, and goes on later."""
    checkpoint_cost_s: float | None = 30.0
    """Time to write a checkpoint on demand; None: it cannot, and loses what it did since the last."""
    ran_s: float = 0.0
    """Run time of earlier starts."""
    preemptions: int = 0

    def __post_init__(self) -> None:
        counts = self.worker_counts
        if not counts or list(counts) != sorted(set(counts)) or counts[0] < 1:
            raise ValueError(f"worker_counts of {self.id} are {counts}; they must be positive and ascending.")
        if any(count % self.workers_per_node for count in counts):
            raise ValueError(
                f"worker_counts of {self.id} are {counts}; each must be a multiple of {self.workers_per_node}."
            )
        if self.worker.is_empty:
            raise ValueError(f"A worker of {self.id} needs neither CPUs nor GPUs; it must need some.")

    @property
    def min_workers(self) -> int:
        """The fewest workers with which it runs."""
        return self.worker_counts[0]

    @property
    def max_workers(self) -> int:
        """The most workers that it can use."""
        return self.worker_counts[-1]

    @property
    def is_elastic(self) -> bool:
        """Whether it can run with different numbers of workers."""
        return len(self.worker_counts) > 1

    @property
    def unit(self) -> Resources:
        """Resources of one group of workers that shares a node."""
        return self.worker * self.workers_per_node

    def needs(self, workers: int | None = None) -> Resources:
        """Resources of `workers` workers; None: the fewest."""
        return self.worker * (self.min_workers if workers is None else workers)

    def expected_s(self, policy: Policy) -> float:
        """Longest run time from a start now on; without time limit or estimate the policy's default."""
        total_s = self.time_limit_s if self.time_limit_s is not None else self.estimate_s
        return max(0.0, (policy.default_time_limit_s if total_s is None else total_s) - self.ran_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A job that has workers."""

    job: Job
    placement: Placement
    started_s: float
    changed_s: float
    """Time of its start or last resize."""
    checkpoint_s: float
    """Time of its newest checkpoint; its start, if it has none."""
    shrinking_to: Placement | None = None
    """Placement that it was told to keep; empty: it was told to stop. Until that is done it holds `placement`."""

    @property
    def workers(self) -> int:
        """Workers that it has."""
        return sum(workers for _, workers in self.placement)

    @property
    def is_stopping(self) -> bool:
        """Whether it was told to stop."""
        return self.shrinking_to == ()

    def ends_s(self, policy: Policy) -> float:
        """Time by which it ends: at its time limit, or where it is expected to."""
        return self.started_s + self.job.expected_s(policy)

    def lost_gpu_s(self, policy: Policy, now: float) -> float:
        """Work lost when it is stopped, in GPU-seconds (CPU-seconds, for a run without GPUs)."""
        age_s = max(0.0, now - self.checkpoint_s)
        cost_s = self.job.checkpoint_cost_s
        redone_s = age_s if cost_s is None else min(age_s, cost_s)
        needs = self.job.needs(self.workers)
        return (redone_s + policy.restart_s) * (needs.gpus or needs.cpus)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingDemand:
    """Replicas that a model of an app needs now."""

    app: str
    model: str
    replicas: int
    replica: Resources
    """Of one replica; it is on one node."""
    priority: int = 1_000_000
    """Compared with jobs' priorities: lower jobs give way."""

    @property
    def key(self) -> tuple[str, str]:
        """Identifies the model."""
        return self.app, self.model


@dataclass(slots=True)
class ServingGrant:
    """Resources that a model has been given."""

    demand: ServingDemand
    nodes: list[str] = field(default_factory=list)
    """The node of each replica, in the order in which they were granted."""
    surplus_since_s: float | None = None
    """Time since which fewer replicas have been needed than granted."""
