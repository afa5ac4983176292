"""Tables of durable work: jobs, their events, queue items, and the leases of leaders (`tandem.jobs.work`)."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, Double, ForeignKey, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from tandem.db.columns import ID_LENGTH, Base, UtcDateTime, ordered_text, row_number

MODEL_LENGTH = 256
"""Longest name of a model in a request, in characters."""


class LeasedWork:
    """Columns of work that one process at a time holds by a lease."""

    kind: Mapped[str] = mapped_column(String(16))
    tenant: Mapped[str] = mapped_column(String(63))
    """Empty: of no tenant."""
    key_id: Mapped[str] = mapped_column(String(64))
    """Id of the API key that it was submitted with; empty: none."""
    state: Mapped[str] = mapped_column(String(16))
    priority: Mapped[int]
    """Lower is more urgent, as in vLLM."""
    attempt: Mapped[int]
    """Times that it was started."""
    failures: Mapped[int]
    """Failed attempts since it was submitted or put into the queue again."""
    max_attempts: Mapped[int]
    not_before: Mapped[datetime | None] = mapped_column(UtcDateTime)
    deadline: Mapped[datetime | None] = mapped_column(UtcDateTime)
    idempotency_key: Mapped[str | None] = mapped_column(String(64))
    """SHA-256 of the key that the client gave."""
    lease_owner: Mapped[str | None] = mapped_column(String(120))
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    fencing_token: Mapped[int] = mapped_column(BigInteger)
    """Grows by one each time that a lease is given out: a write with an older number is refused."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    error: Mapped[str | None] = mapped_column(Text)
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))


class JobRow(LeasedWork, Base):
    """One job of any kind."""

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("tenant", "idempotency_key", name="uq_jobs_idempotency_key"),
        UniqueConstraint("tenant", "kind", "content_hash", name="uq_jobs_content_hash"),
        Index("ix_jobs_state", "state", "priority", "number"),
        Index("ix_jobs_tenant", "tenant", "number"),
        Index("ix_jobs_deadline", "state", "deadline"),
        Index("ix_jobs_parent", "parent"),
        Index("ix_jobs_ended_at", "ended_at"),
    )

    number: Mapped[int] = mapped_column(row_number(), primary_key=True)
    """In the order of submission."""
    id: Mapped[str] = mapped_column(ordered_text(ID_LENGTH), unique=True)
    name: Mapped[str] = mapped_column(String(96))
    spec: Mapped[dict[str, Any]] = mapped_column(JSON)
    """What to do, as the kind defines it."""
    content_hash: Mapped[str | None] = mapped_column(String(64))
    """Set where a second submission of the same content is the same job."""
    request_digest: Mapped[str] = mapped_column(String(64))
    """SHA-256 of kind, name and spec, by which an idempotency key that is used for another request is known."""
    cpus_per_worker: Mapped[float] = mapped_column(Double)
    gpus_per_worker: Mapped[float] = mapped_column(Double)
    min_workers: Mapped[int]
    max_workers: Mapped[int]
    workers: Mapped[int | None]
    """Number that it was started with."""
    runner: Mapped[str] = mapped_column(String(16))
    handle: Mapped[str | None] = mapped_column(String(255))
    """The runner's own name of the newest attempt; None: it has not answered yet."""
    reason: Mapped[str | None] = mapped_column(Text)
    """Why it is in this state, for people."""
    parent: Mapped[str | None] = mapped_column(ordered_text(ID_LENGTH))
    """Id of the job that this one goes on from."""
    last_event: Mapped[int]
    """Number of its newest event; 0: none."""


class JobEventRow(Base):
    """One event of a job. Append-only."""

    __tablename__ = "job_events"

    job: Mapped[str] = mapped_column(
        ordered_text(ID_LENGTH), ForeignKey("jobs.id", name="fk_job_events_job", ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """From 1, without gaps."""
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    event: Mapped[dict[str, Any]] = mapped_column(JSON)
    """As `observability.codec` writes it."""


class QueueItemRow(LeasedWork, Base):
    """One request to a model that waits for an engine: a row of a batch job, or alone."""

    __tablename__ = "queue_items"
    __table_args__ = (
        UniqueConstraint("tenant", "idempotency_key", name="uq_queue_items_idempotency_key"),
        UniqueConstraint("job", "position", name="uq_queue_items_position"),
        Index("ix_queue_items_waiting", "queue", "state", "adapter", "tenant", "priority", "number"),
        Index("ix_queue_items_lease", "state", "lease_until"),
        Index("ix_queue_items_deadline", "state", "deadline"),
        Index("ix_queue_items_job", "job", "state"),
    )

    number: Mapped[int] = mapped_column(row_number(), primary_key=True)
    """In the order of submission, which is the order within a priority."""
    id: Mapped[str] = mapped_column(String(64), unique=True)
    job: Mapped[str | None] = mapped_column(
        ordered_text(ID_LENGTH), ForeignKey("jobs.id", name="fk_queue_items_job", ondelete="CASCADE")
    )
    position: Mapped[int | None]
    """Its row in the job's input, from 0."""
    queue: Mapped[str] = mapped_column(ordered_text(ID_LENGTH))
    """Id of the base model: engines of that base claim from it."""
    adapter: Mapped[str] = mapped_column(ordered_text(ID_LENGTH))
    """Id of the adapter; empty: none."""
    payload: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    payload_reference: Mapped[str | None] = mapped_column(String(4096))
    """Where the request is kept, if not in `payload`."""
    result_reference: Mapped[str | None] = mapped_column(String(4096))
    """Where the answer is kept, if not in `result`."""


class BatchModelRow(Base):
    """A model that a batch names, until all of its models are known to be usable or not (`jobs.batches.model_checks`)."""

    __tablename__ = "batch_models"

    job: Mapped[str] = mapped_column(
        ordered_text(ID_LENGTH), ForeignKey("jobs.id", name="fk_batch_models_job", ondelete="CASCADE"), primary_key=True
    )
    model: Mapped[str] = mapped_column(ordered_text(MODEL_LENGTH), primary_key=True)
    """As the requests name it."""
    is_usable: Mapped[bool]
    """Whether a gateway has found it usable."""
    error: Mapped[dict[str, str] | None] = mapped_column(JSON(none_as_null=True))
    """Code and message of the gateway that refused it first; None: none has."""
    refused_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class LeaderRow(Base):
    """The process that leads in one role, such as the dispatcher of jobs."""

    __tablename__ = "leaders"

    role: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner: Mapped[str] = mapped_column(String(120))
    term: Mapped[int] = mapped_column(BigInteger)
    """Grows by one with each change of the leader: it fences writes of those before."""
    until: Mapped[datetime] = mapped_column(UtcDateTime)
    """End of the lease."""


class CapacityRow(Base):
    """One row for each role: the cluster's CPUs and GPUs, as the process that leads in it saw them last."""

    __tablename__ = "cluster_capacity"

    role: Mapped[str] = mapped_column(String(32), primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    content: Mapped[dict[str, Any]] = mapped_column(JSON)
    """As `jobs.tracking.capacity` writes it."""
