"""Conversion between rows of durable work and its records."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from tandem.db.schema import JobRow, QueueItemRow
from tandem.ids import check_name, digest, fingerprint
from tandem.jobs.work.records import Item, ItemSubmission, Job, JobSubmission, Lease, Resources
from tandem.jobs.work.states import JobKind, State


def request_digest(submission: JobSubmission) -> str:
    """SHA-256 by which two submissions with one idempotency key are compared."""
    return digest([submission.kind.value, submission.name, submission.spec])


def job_values(submission: JobSubmission, now: datetime) -> dict[str, Any]:
    """Columns of a new job."""
    need = submission.resources
    return {
        "id": submission.id or _new_id(submission),
        "kind": submission.kind.value,
        "tenant": submission.tenant,
        "key_id": submission.key_id,
        "name": submission.name,
        "spec": dict(submission.spec),
        "content_hash": submission.content_hash,
        "request_digest": request_digest(submission),
        "state": (State.HELD if submission.held else State.QUEUED).value,
        "priority": submission.priority,
        "cpus_per_worker": need.cpus_per_worker,
        "gpus_per_worker": need.gpus_per_worker,
        "min_workers": need.min_workers,
        "max_workers": need.max_workers,
        "runner": submission.runner,
        "attempt": 0,
        "failures": 0,
        "max_attempts": submission.max_attempts,
        "not_before": submission.not_before,
        "deadline": submission.deadline,
        "idempotency_key": fingerprint(submission.idempotency_key),
        "parent": submission.parent,
        "fencing_token": 0,
        "created_at": now,
        "last_event": 0,
    }


def to_job(row: JobRow) -> Job:
    """The record of a job's row."""
    return Job(
        number=row.number,
        id=row.id,
        kind=JobKind(row.kind),
        tenant=row.tenant,
        key_id=row.key_id,
        name=row.name,
        spec=row.spec,
        content_hash=row.content_hash,
        state=State(row.state),
        reason=row.reason,
        priority=row.priority,
        resources=Resources(
            cpus_per_worker=row.cpus_per_worker,
            gpus_per_worker=row.gpus_per_worker,
            min_workers=row.min_workers,
            max_workers=row.max_workers,
        ),
        workers=row.workers,
        runner=row.runner,
        handle=row.handle,
        attempt=row.attempt,
        failures=row.failures,
        max_attempts=row.max_attempts,
        not_before=row.not_before,
        deadline=row.deadline,
        parent=row.parent,
        lease=_lease(row),
        lease_until=row.lease_until,
        created_at=row.created_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
        error=row.error,
        result=row.result,
        last_event=row.last_event,
    )


def item_values(submission: ItemSubmission, now: datetime) -> dict[str, Any]:
    """Columns of a new queue item."""
    return {
        "id": f"item_{uuid.uuid4().hex}",
        "kind": JobKind.GENERATE.value,
        "tenant": submission.tenant,
        "key_id": submission.key_id,
        "job": submission.job,
        "position": submission.position,
        "queue": submission.queue,
        "adapter": submission.adapter,
        "payload": None if submission.payload is None else dict(submission.payload),
        "payload_reference": submission.payload_reference,
        "state": State.QUEUED.value,
        "priority": submission.priority,
        "attempt": 0,
        "failures": 0,
        "max_attempts": submission.max_attempts,
        "deadline": submission.deadline,
        "idempotency_key": fingerprint(submission.idempotency_key),
        "fencing_token": 0,
        "created_at": now,
    }


def to_item(row: QueueItemRow) -> Item:
    """The record of an item's row."""
    return Item(
        number=row.number,
        id=row.id,
        job=row.job,
        position=row.position,
        tenant=row.tenant,
        key_id=row.key_id,
        queue=row.queue,
        adapter=row.adapter,
        payload=row.payload,
        payload_reference=row.payload_reference,
        state=State(row.state),
        priority=row.priority,
        attempt=row.attempt,
        failures=row.failures,
        max_attempts=row.max_attempts,
        not_before=row.not_before,
        deadline=row.deadline,
        lease=_lease(row),
        lease_until=row.lease_until,
        created_at=row.created_at,
        ended_at=row.ended_at,
        error=row.error,
        result=row.result,
        result_reference=row.result_reference,
    )


def _lease(row: JobRow | QueueItemRow) -> Lease | None:
    return None if row.lease_owner is None else Lease(row.id, row.lease_owner, row.fencing_token)


def _new_id(submission: JobSubmission) -> str:
    """`NAME-` and 12 hex digits: of the content and the tenant where the content decides, else drawn at random."""
    check_name(submission.name)
    if submission.content_hash is None:
        return f"{submission.name}-{uuid.uuid4().hex[:12]}"
    return f"{submission.name}-{digest([submission.tenant, submission.kind.value, submission.content_hash])[:12]}"
