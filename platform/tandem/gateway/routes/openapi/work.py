"""Part of the OpenAPI document for fine-tuning jobs and batches: paths, and the schemas of their wire models. Pure."""

from __future__ import annotations

from typing import Any

from tandem.api.openai.batches import Batch, BatchCreation, BatchList
from tandem.api.openai.fine_tuning import (
    FineTuningCheckpointList,
    FineTuningCreation,
    FineTuningEventList,
    FineTuningJob,
    FineTuningJobList,
)
from tandem.gateway.routes.openapi.operations import (
    AFTER,
    IDEMPOTENCY_KEY,
    Paths,
    limit,
    operation,
    path_parameter,
    query,
    schemas_of,
    stream,
)

BODIES = (FineTuningCreation, BatchCreation)
ANSWERS = (FineTuningJob, FineTuningJobList, FineTuningEventList, FineTuningCheckpointList, Batch, BatchList)
METADATA = {
    **query("metadata", {"type": "object", "additionalProperties": {"type": "string"}}),
    "description": "`metadata[KEY]=VALUE` keeps jobs that have the pair",
    "style": "deepObject",
    "explode": True,
}


def work_schemas() -> dict[str, Any]:
    """The schemas by name."""
    return schemas_of(BODIES, ANSWERS)


def work_paths() -> Paths:
    """The paths."""
    return _fine_tuning_paths() | _batch_paths()


def _fine_tuning_paths() -> Paths:
    path, job_id = "/v1/fine_tuning/jobs", path_parameter("job_id")
    events = operation(
        "list_fine_tuning_events",
        FineTuningEventList,
        parameters=[job_id, AFTER, limit(20, 100), stream("Oldest first, until the job ends")],
    )
    events["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    checkpoints = operation(
        "list_fine_tuning_checkpoints", FineTuningCheckpointList, parameters=[job_id, AFTER, limit(10, 100)]
    )
    return {
        path: {
            "get": operation("list_fine_tuning_jobs", FineTuningJobList, parameters=[AFTER, limit(20, 100), METADATA]),
            "post": operation(
                "create_fine_tuning_job", FineTuningJob, body=FineTuningCreation, parameters=[IDEMPOTENCY_KEY]
            ),
        },
        f"{path}/{{job_id}}": {"get": operation("retrieve_fine_tuning_job", FineTuningJob, parameters=[job_id])},
        f"{path}/{{job_id}}/events": {"get": events},
        f"{path}/{{job_id}}/checkpoints": {"get": checkpoints},
        **{
            f"{path}/{{job_id}}/{action}": {
                "post": operation(f"{action}_fine_tuning_job", FineTuningJob, parameters=[job_id])
            }
            for action in ("cancel", "pause", "resume")
        },
    }


def _batch_paths() -> Paths:
    path, batch_id = "/v1/batches", path_parameter("batch_id")
    return {
        path: {
            "get": operation("list_batches", BatchList, parameters=[AFTER, limit(20, 100)]),
            "post": operation("create_batch", Batch, body=BatchCreation, parameters=[IDEMPOTENCY_KEY]),
        },
        f"{path}/{{batch_id}}": {"get": operation("retrieve_batch", Batch, parameters=[batch_id])},
        f"{path}/{{batch_id}}/cancel": {"post": operation("cancel_batch", Batch, parameters=[batch_id])},
    }
