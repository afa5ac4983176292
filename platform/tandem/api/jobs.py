"""Wire models of the native routes `/v1/tandem/jobs`, `queue` and `capacity`. Times are seconds since 1970."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

JobKind = Literal["train", "sweep", "batch", "evaluate", "export", "generate"]
JobState = Literal[
    "queued",
    "held",
    "paused",
    "starting",
    "running",
    "pausing",
    "preempting",
    "stopping",
    "expiring",
    "finished",
    "failed",
    "cancelled",
    "expired",
    "dead",
]
ENDED_STATES: frozenset[str] = frozenset({"finished", "failed", "cancelled", "expired", "dead"})
"""States of a job that is over: only `requeue` makes another state of them."""
JobAction = Literal["cancel", "pause", "resume", "requeue", "hold", "release"]


class TandemJob(BaseModel):
    """One job of any kind."""

    id: str
    object: Literal["tandem.job"] = "tandem.job"
    kind: JobKind
    name: str
    tenant: str
    """Empty: of no tenant, as jobs by command are."""
    state: JobState
    reason: str | None = None
    """Why it is in this state, for people."""
    error: str | None = None
    priority: int
    """Lower is more urgent."""
    attempt: int
    """Times that it was started."""
    failures: int
    """Failed attempts since it was submitted or requeued."""
    max_attempts: int
    cpus_per_worker: float
    gpus_per_worker: float
    min_workers: int
    max_workers: int
    workers: int | None = None
    """Number that it was started with; null: it has not started."""
    parent: str | None = None
    """Id of the job that it goes on from."""
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    not_before: float | None = None
    """It does not start before this time, after a failure for one."""
    deadline: float | None = None
    result: dict[str, Any] | None = None


class TandemJobList(BaseModel):
    """One page of jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[TandemJob]
    first_id: str | None
    last_id: str | None
    has_more: bool


class TandemJobEvent(BaseModel):
    """One event of a job: a change of its state, or an event of its run."""

    id: str
    """`after` of the request for the events that follow it."""
    object: Literal["tandem.job.event"] = "tandem.job.event"
    job_id: str
    at: float | None
    event: str
    """`state`, `step`, `evaluation`, `checkpoint`, `finished`, ..."""
    data: dict[str, Any] = Field(default_factory=dict)
    """The fields of this kind of event."""


class TandemJobEventList(BaseModel):
    """One page of events, oldest first."""

    object: Literal["list"] = "list"
    data: list[TandemJobEvent]
    first_id: str | None
    last_id: str | None
    has_more: bool


class TandemLogLine(BaseModel):
    """One line of a run's log."""

    attempt: int
    """Of the job, from 1: each has a log of its own."""
    line: int
    """From 1."""
    text: str


class TandemSeries(BaseModel):
    """The values of one metric, by step. A step that was computed again has its newest value."""

    name: str
    """`loss`, `learning_rate`, `grad_norm`, `tokens_per_s`, `evaluation_loss`, ..."""
    steps: list[int]
    values: list[float | None]
    """null: not a finite number."""
    times: list[float | None]


class TandemJobMetrics(BaseModel):
    """Metrics of a training job."""

    object: Literal["tandem.job.metrics"] = "tandem.job.metrics"
    job_id: str
    series: list[TandemSeries]


class TandemDataset(BaseModel):
    """A dataset that a job reads."""

    role: Literal["training", "validation"]
    location: str
    """Folder or URI of a dataset, or the id of an uploaded file."""
    digest: str | None = None
    """SHA-256 of its contents; null: the dataset is not built yet, or is not there any more."""


class TandemLineage(BaseModel):
    """What a job was made from, and what was made of it."""

    object: Literal["tandem.job.lineage"] = "tandem.job.lineage"
    job_id: str
    parent: str | None
    children: list[str]
    """Ids of jobs that go on from it, newest first; 1,000 at most."""
    base: str | None
    """Id or folder of the model that it adapts."""
    datasets: list[TandemDataset]
    result_model: str | None
    """Id in the registry of what it made."""


class TandemJobCount(BaseModel):
    """Number of jobs of one kind in one state."""

    kind: JobKind
    state: JobState
    count: int


class TandemWaitingJob(BaseModel):
    """A job that waits to be started."""

    id: str
    kind: JobKind
    name: str
    tenant: str
    priority: int
    reason: str | None = None
    """Why it waits, as the dispatcher said last."""
    created_at: float
    not_before: float | None = None


class TandemQueue(BaseModel):
    """Jobs and requests by state, and the jobs that wait."""

    object: Literal["tandem.queue"] = "tandem.queue"
    jobs: list[TandemJobCount]
    requests: dict[JobState, int]
    """Requests of batches that have not ended, by state."""
    waiting: list[TandemWaitingJob]
    """By priority, then by submission; 100 at most."""
    oldest_waiting_s: float | None
    """Seconds for which the oldest of all waiting jobs has waited since it was submitted; null: none waits."""


class TandemAmounts(BaseModel):
    """CPUs and GPUs."""

    cpus: float
    gpus: float


class TandemLimit(BaseModel):
    """CPUs and GPUs that may be held at most; null: any number."""

    cpus: float | None
    gpus: float | None


class TandemNodeType(BaseModel):
    """The nodes of one type."""

    node_type: str
    """Ray's group of nodes, else the type of their accelerators; empty: nodes that have neither."""
    nodes: int
    total: TandemAmounts
    used: TandemAmounts
    free: TandemAmounts
    cordoned: TandemAmounts
    """Not used, on nodes that get no new work."""


class TandemTenantShare(BaseModel):
    """What a tenant holds of the cluster, and may hold."""

    tenant: str
    weight: float
    quota: TandemAmounts
    """What it gets back from those who borrow it: as configured, else its share by weight."""
    limit: TandemLimit
    used: TandemAmounts
    """By its jobs."""
    share: float
    """The larger one of its shares of the cluster's CPUs and GPUs, from 0 to 1."""


class TandemCapacity(BaseModel):
    """CPUs and GPUs of the cluster, as its dispatcher saw them last."""

    object: Literal["tandem.capacity"] = "tandem.capacity"
    at: float
    age_s: float
    """Seconds since then. While a dispatcher leads, it looks every 10 s."""
    total: TandemAmounts
    serving: TandemAmounts
    """Used by replicas, and by whatever else is no job."""
    training: TandemAmounts
    """Used by jobs."""
    free: TandemAmounts
    cordoned: TandemAmounts
    """Not used, on nodes that get no new work."""
    node_types: list[TandemNodeType]
    tenants: list[TandemTenantShare]
    """The caller's tenant; for admins those that have shares or run jobs."""
