"""Records of durable work: what is submitted, jobs, queue items, leases and pages. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from tandem.jobs.work.states import JobKind, State
from tandem.observability.events import Event


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What a job needs to run: a number of equal workers."""

    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    min_workers: int = 1
    max_workers: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSubmission:
    """A job to be stored."""

    kind: JobKind
    name: str
    spec: Mapping[str, Any]
    """What to do, as the kind defines it; JSON-able."""
    id: str | None = None
    """None: one is made of the name, and of the content hash where there is one."""
    tenant: str = ""
    key_id: str = ""
    content_hash: str | None = None
    """Set where a second submission of the same content by the tenant is the same job (docs/adr/0002-jobs-by-content.md)."""
    idempotency_key: str | None = None
    """The client's own; a second submission of the tenant with it is the same job."""
    runner: str = "ray"
    """Name of the runner that starts it."""
    priority: int = 0
    """Lower is more urgent."""
    resources: Resources = Resources()
    max_attempts: int = 3
    not_before: datetime | None = None
    deadline: datetime | None = None
    """It is stopped when this time has passed."""
    parent: str | None = None
    """Id of the job that it goes on from."""
    held: bool = False
    """Wait until it is released."""


class Lease(NamedTuple):
    """The right to write to one job or queue item."""

    id: str
    owner: str
    token: int
    """Fencing token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One job."""

    number: int
    id: str
    kind: JobKind
    tenant: str
    key_id: str
    name: str
    spec: Mapping[str, Any]
    content_hash: str | None
    state: State
    reason: str | None
    """Why it is in this state, for people."""
    priority: int
    resources: Resources
    workers: int | None
    runner: str
    handle: str | None
    attempt: int
    failures: int
    max_attempts: int
    not_before: datetime | None
    deadline: datetime | None
    parent: str | None
    lease: Lease | None
    lease_until: datetime | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    error: str | None
    result: Mapping[str, Any] | None
    last_event: int

    @property
    def run_name(self) -> str:
        """The name of the newest attempt, the same in every process: runners know by it what they have started."""
        return f"{self.id}.{self.attempt}"


def split_run_name(name: str) -> tuple[str, str]:
    """The id of the job and the number of the attempt in a `run_name`."""
    job_id, _, attempt = name.rpartition(".")
    return job_id, attempt


@dataclass(frozen=True, kw_only=True, slots=True)
class PastRun:
    """The newest attempt of a job that was started without the database, by a command."""

    state: State
    attempt: int
    """Times that it was started."""
    handle: str | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    error: str | None
    result: Mapping[str, Any] | None


class Submitted(NamedTuple):
    """A job after its submission."""

    job: Job
    is_new: bool
    """False: it had been submitted before."""


class JobPage(NamedTuple):
    """Some jobs, newest first."""

    jobs: list[Job]
    has_more: bool


class NumberedEvent(NamedTuple):
    """An event of a job."""

    number: int
    """From 1 in each job."""
    event: Event


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemSubmission:
    """A queue item to be stored."""

    queue: str
    """Id of the base model."""
    payload: Mapping[str, Any] | None = None
    payload_reference: str | None = None
    """Where the request is kept, if not in `payload`."""
    adapter: str = ""
    job: str | None = None
    position: int | None = None
    """Its row in the job's input, from 0. Adding the same row of a job again changes nothing."""
    tenant: str = ""
    key_id: str = ""
    priority: int = 0
    max_attempts: int = 3
    deadline: datetime | None = None
    idempotency_key: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One queue item."""

    number: int
    id: str
    job: str | None
    position: int | None
    tenant: str
    key_id: str
    queue: str
    adapter: str
    payload: Mapping[str, Any] | None
    payload_reference: str | None
    state: State
    priority: int
    attempt: int
    failures: int
    max_attempts: int
    not_before: datetime | None
    deadline: datetime | None
    lease: Lease | None
    lease_until: datetime | None
    created_at: datetime
    ended_at: datetime | None
    error: str | None
    result: Mapping[str, Any] | None
    result_reference: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The end of one queue item, as its worker reports it."""

    lease: Lease
    result: Mapping[str, Any] | None = None
    result_reference: str | None = None
    error: str | None = None
    """Set where it failed."""
    retryable: bool = True
    """Whether another attempt may succeed."""
    retry_after_s: float | None = None
    """Set where the item is given back unanswered: it waits for so many seconds, and no attempt is counted."""


class WaitingItems(NamedTuple):
    """Items of a queue that wait, of one adapter and tenant."""

    adapter: str
    tenant: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reported:
    """What became of several answers."""

    recorded: list[str] = field(default_factory=list)
    """Ids of the items that were written, now or when the same answer was sent before."""
    refused: list[str] = field(default_factory=list)
    """Ids of items whose lease belongs to somebody else by now, or was ended: nothing was changed."""
