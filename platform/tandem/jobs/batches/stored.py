"""Batches as they are stored: jobs, their queue items, and the folder of their answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tandem.jobs.batches.requests import BatchRequest, RequestPlace
from tandem.jobs.work.records import ItemSubmission, Job
from tandem.settings import settings

TYPE = "openai_batch"
"""`type` in the specification of such jobs."""
RUNNER = "openai_batch"
"""Name of the runner that such jobs give."""
QUEUE = "batches"
"""Name of the queue from which gateways take their requests."""


def answers_folder(job_id: str) -> Path:
    """The folder of the segments with a batch's answers."""
    return settings().jobs_dir / job_id / "answers"


def items_of(job: Job, requests: Iterable[BatchRequest], max_attempts: int) -> Iterator[ItemSubmission]:
    """The queue items of a batch."""
    payload = {"url": job.spec["endpoint"], "file": job.spec["location"]}
    if job.spec.get("models"):
        payload["models"] = job.spec["models"]
    for position, request in enumerate(requests):
        yield ItemSubmission(
            queue=QUEUE,
            job=job.id,
            position=position,
            adapter=request.model[:120],
            payload={"custom_id": request.custom_id, **payload},
            payload_reference=str(RequestPlace(request.offset, request.length)),
            tenant=job.tenant,
            key_id=job.key_id,
            priority=job.priority,
            max_attempts=max_attempts,
            deadline=job.deadline,
        )
