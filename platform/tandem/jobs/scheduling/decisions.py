"""Decisions of the scheduler. The driver carries each out, and tells the state when it is done (`state.ClusterState`)."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.jobs.scheduling.records import Placement


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Start all workers of a job."""

    job_id: str
    placement: Placement
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Preempt:
    """Write a checkpoint and stop; the job waits again, and goes on from there."""

    job_id: str
    reason: str
    for_job: str = ""
    """Id of the job that gets the resources, for the operator; empty: replicas do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shrink:
    """Write a checkpoint and go on with the workers of `placement`."""

    job_id: str
    placement: Placement
    reason: str
    for_job: str = ""
    """Id of the job that gets the resources, for the operator; empty: replicas do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grow:
    """Write a checkpoint and go on with the workers of `placement`."""

    job_id: str
    placement: Placement
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """End a job for good: it has used up its time limit."""

    job_id: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Hold:
    """Leave a job waiting."""

    job_id: str
    reason: str
    expected_s: float | None = None
    """Latest time of its start, if resources are reserved for it: running jobs end at their time limits or before."""
    band: int | None = None
    """With a reservation: the band (`decide`) in which the job was first. It stays first there until it starts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartReplicas:
    """Give a model resources for more replicas, one on each entry of `nodes`."""

    app: str
    model: str
    nodes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseReplicas:
    """Take the resources of unneeded replicas back, one on each entry of `nodes`."""

    app: str
    model: str
    nodes: tuple[str, ...]


Decision = Start | Preempt | Shrink | Grow | Stop | Hold | StartReplicas | ReleaseReplicas
