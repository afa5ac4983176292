"""Requests of the native job routes, as both clients send them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote, urlencode

from pydantic import BaseModel

from tandem.api import jobs as wire
from tandem.api.usage import UsagePage

M = TypeVar("M", bound=BaseModel)
JOBS, QUEUE, CAPACITY, USAGE = "/tandem/jobs", "/tandem/queue", "/tandem/capacity", "/tandem/usage"
USAGE_PAGE = 1000
PAGE, EVENTS_PAGE = 100, 1000
RECONNECTIONS = 5
"""Times in a row that a stream is asked for again without a new item."""
RECONNECT_AFTER_S = 1.0
ANSWER_TIMEOUT_S, CONNECT_TIMEOUT_S = 60.0, 5.0
"""Longer than the time after which a quiet stream sends a comment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRequest(Generic[M]):
    """One request below the API's base URL."""

    path: str
    model: type[M]
    """Of the answer, or of each item of a stream."""
    method: Literal["get", "post"] = "get"
    query: Mapping[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """Path and query; a parameter with several values is repeated, one with None is left out."""
        said = {name: value for name, value in self.query.items() if value is not None}
        query = urlencode(said, doseq=True)
        return f"{self.path}?{query}" if query else self.path


def page_request(
    *,
    kinds: Sequence[str],
    states: Sequence[str],
    parent: str | None,
    tenant: str | None,
    after: str | None,
    limit: int,
) -> JobRequest[wire.TandemJobList]:
    """A page of jobs."""
    query = {"kind": kinds, "state": states, "parent": parent, "tenant": tenant, "after": after, "limit": limit}
    return JobRequest(path=JOBS, model=wire.TandemJobList, query=query)


def job_request(job_id: str) -> JobRequest[wire.TandemJob]:
    """One job."""
    return JobRequest(path=job_path(job_id), model=wire.TandemJob)


def action_request(job_id: str, action: wire.JobAction) -> JobRequest[wire.TandemJob]:
    """A change of a job."""
    return JobRequest(path=f"{job_path(job_id)}/{action}", model=wire.TandemJob, method="post")


def events_request(job_id: str, after: str | None) -> JobRequest[wire.TandemJobEventList]:
    """A page of events."""
    query = {"after": after, "limit": EVENTS_PAGE}
    return JobRequest(path=f"{job_path(job_id)}/events", model=wire.TandemJobEventList, query=query)


def event_stream_request(job_id: str, after: str | None) -> JobRequest[wire.TandemJobEvent]:
    """A stream of events."""
    query = {"after": after, "stream": "true"}
    return JobRequest(path=f"{job_path(job_id)}/events", model=wire.TandemJobEvent, query=query)


def log_request(job_id: str, attempt: int | None, line: int, *, follow: bool) -> JobRequest[wire.TandemLogLine]:
    """The log from a line on: what there is, or a stream."""
    query = {"attempt": attempt, "line": line, "stream": str(follow).lower()}
    return JobRequest(path=f"{job_path(job_id)}/logs", model=wire.TandemLogLine, query=query)


def metrics_request(job_id: str, names: Sequence[str], after_step: int | None) -> JobRequest[wire.TandemJobMetrics]:
    """Metric series."""
    query = {"name": names, "after_step": after_step}
    return JobRequest(path=f"{job_path(job_id)}/metrics", model=wire.TandemJobMetrics, query=query)


def lineage_request(job_id: str) -> JobRequest[wire.TandemLineage]:
    """The lineage of a job."""
    return JobRequest(path=f"{job_path(job_id)}/lineage", model=wire.TandemLineage)


def queue_request(tenant: str | None) -> JobRequest[wire.TandemQueue]:
    """The queue."""
    return JobRequest(path=QUEUE, model=wire.TandemQueue, query={"tenant": tenant})


def capacity_request(tenant: str | None) -> JobRequest[wire.TandemCapacity]:
    """The capacity of the cluster."""
    return JobRequest(path=CAPACITY, model=wire.TandemCapacity, query={"tenant": tenant})


def usage_request(
    by: Sequence[str], *, since: datetime | None, until: datetime | None, tenant: str | None, offset: int
) -> JobRequest[UsagePage]:
    """A page of sums of requests and tokens."""
    query = {
        "by": ",".join(by),
        "since": since and since.isoformat(),
        "until": until and until.isoformat(),
        "tenant": tenant,
        "offset": offset,
        "limit": USAGE_PAGE,
    }
    return JobRequest(path=USAGE, model=UsagePage, query=query)


def job_path(job_id: str) -> str:
    """The path of a job."""
    return f"{JOBS}/{quote(job_id, safe='')}"
