"""Part of the OpenAPI document for native job routes: paths, and the schemas of `tandem.api.jobs`. Pure."""

from __future__ import annotations

from typing import Any, get_args

from tandem.api import jobs as wire
from tandem.api.usage import UsagePage
from tandem.gateway.routes.openapi.operations import (
    AFTER,
    Model,
    Paths,
    limit,
    operation,
    path_parameter,
    query,
    schemas_of,
    stream,
)

ANSWERS = (
    wire.TandemJob,
    wire.TandemJobList,
    wire.TandemJobEvent,
    wire.TandemJobEventList,
    wire.TandemLogLine,
    wire.TandemJobMetrics,
    wire.TandemLineage,
    wire.TandemQueue,
    wire.TandemCapacity,
    UsagePage,
)
TENANT = query("tenant", {"type": "string"}, "Jobs of this tenant alone; for admins, who see those of all")
LAST_EVENT_ID = {"name": "Last-Event-ID", "in": "header", "schema": {"type": "string"}}


def job_schemas() -> dict[str, Any]:
    """The schemas by name."""
    return schemas_of((), ANSWERS)


def job_paths() -> Paths:
    """The paths."""
    path, job_id = "/v1/tandem/jobs", path_parameter("job_id")
    filters = [_several("kind", get_args(wire.JobKind)), _several("state", get_args(wire.JobState))]
    page = [*filters, query("parent", {"type": "string"}), TENANT, AFTER, limit(20, 100)]
    series = {**query("name", {"type": "array", "items": {"type": "string"}}), "explode": True}
    metrics = [job_id, series, _number("after_step", 0)]
    return {
        path: {"get": operation("list_jobs", wire.TandemJobList, parameters=page)},
        f"{path}/{{job_id}}": {"get": operation("retrieve_job", wire.TandemJob, parameters=[job_id])},
        **{
            f"{path}/{{job_id}}/{action}": {"post": operation(f"{action}_job", wire.TandemJob, parameters=[job_id])}
            for action in get_args(wire.JobAction)
        },
        f"{path}/{{job_id}}/events": {"get": _events(job_id)},
        f"{path}/{{job_id}}/logs": {"get": _logs(job_id)},
        f"{path}/{{job_id}}/metrics": {
            "get": operation("retrieve_job_metrics", wire.TandemJobMetrics, parameters=metrics)
        },
        f"{path}/{{job_id}}/lineage": {
            "get": operation("retrieve_job_lineage", wire.TandemLineage, parameters=[job_id])
        },
        "/v1/tandem/queue": {"get": operation("retrieve_queue", wire.TandemQueue, parameters=[TENANT])},
        "/v1/tandem/capacity": {"get": operation("retrieve_capacity", wire.TandemCapacity, parameters=[TENANT])},
        "/v1/tandem/usage": {"get": operation("list_usage", UsagePage, parameters=_usage_parameters())},
    }


def _usage_parameters() -> list[dict[str, Any]]:
    by = "Columns with commas: hour, day, tenant, key_id, model, adapter, route"
    time = {"type": "string", "format": "date-time"}
    return [
        query("by", {"type": "string", "maxLength": 100, "default": "hour,key_id,model"}, by),
        query("since", time, "Without a zone in UTC; by default 30 days ago"),
        query("until", time),
        query("offset", {"type": "integer", "minimum": 0, "maximum": 2**31, "default": 0}),
        limit(1000, 10_000),
        TENANT,
    ]


def _events(job_id: dict[str, Any]) -> dict[str, Any]:
    parameters = [job_id, AFTER, limit(100, 1000), stream("Go on until the job ends"), LAST_EVENT_ID]
    events = operation("list_job_events", wire.TandemJobEventList, parameters=parameters)
    events["responses"]["200"]["content"] |= _lines(wire.TandemJobEvent)
    return events


def _logs(job_id: dict[str, Any]) -> dict[str, Any]:
    parameters = [
        job_id, _number("attempt", 1), _number("line", 1), stream("Go on until the attempt ends"), LAST_EVENT_ID,
    ]  # fmt: skip
    logs = operation("read_job_log", wire.TandemLogLine, parameters=parameters)
    logs["responses"]["200"]["content"] = _lines(wire.TandemLogLine)
    return logs


def _lines(model: Model) -> dict[str, Any]:
    """JSON lines, of which each is a model, or server-sent events whose data is one."""
    description = f"Each line is a {model.__name__}"
    text = {"schema": {"type": "string", "description": description}}
    return {"application/x-ndjson": text, "text/event-stream": text}


def _several(name: str, values: tuple[str, ...]) -> dict[str, Any]:
    return {**query(name, {"type": "array", "items": {"enum": list(values)}}), "explode": True}


def _number(name: str, least: int) -> dict[str, Any]:
    return query(name, {"type": "integer", "minimum": least, "maximum": 10**9})
