"""Native routes of jobs of every kind and of the queue: `/v1/tandem/jobs`, `/v1/tandem/queue`."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import TypeVar, get_args

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tandem.api import jobs as wire
from tandem.errors import did_you_mean
from tandem.gateway.errors import ApiError
from tandem.gateway.identity.authentication import principal_of
from tandem.gateway.requests.query import page_limit, query_number
from tandem.gateway.work.calls import WorkCalls, check_trainer
from tandem.gateway.work.streams import LineStream, OpenStreams, wants_lines, wants_stream
from tandem.jobs.tracking.service import JobTracking
from tandem.jobs.work.states import JobKind, State

PATH, QUEUE_PATH = "/v1/tandem/jobs", "/v1/tandem/queue"
ACTIONS: tuple[wire.JobAction, ...] = get_args(wire.JobAction)
LARGEST = 10**9
"""Largest number of a step, a line or an attempt in a query."""

E = TypeVar("E", bound=StrEnum)


class JobRoutes:
    """The route handlers. A key sees jobs of its tenant, an admin's those of all, as does everybody in an app without keys."""

    def __init__(self, tracking: JobTracking, calls: WorkCalls, log_calls: WorkCalls, streams: OpenStreams) -> None:
        """`log_calls`: the threads that ask a cluster for logs."""
        self._tracking = tracking
        self._calls = calls
        self._log_calls = log_calls
        self._streams = streams

    def routes(self) -> list[BaseRoute]:
        """The routes for Starlette."""
        job = f"{PATH}/{{job_id}}"
        return [
            Route(PATH, self.list_jobs),
            Route(QUEUE_PATH, self.queue),
            Route(job, self.show),
            *(Route(f"{job}/{action}", self._changer(action), methods=["POST"]) for action in ACTIONS),
            Route(f"{job}/events", self.events),
            Route(f"{job}/logs", self.logs),
            Route(f"{job}/metrics", self.metrics),
            Route(f"{job}/lineage", self.lineage),
        ]

    async def list_jobs(self, request: Request) -> Response:
        """Jobs, newest first; `kind` and `state` may be repeated."""
        query = request.query_params
        page = await self._calls(
            self._tracking.page,
            visible_tenant(request),
            kinds=_choices(request, "kind", JobKind),
            states=_choices(request, "state", State),
            parent=query.get("parent"),
            after=query.get("after"),
            limit=page_limit(request, 20, 100),
        )
        return json_of(page)

    async def show(self, request: Request) -> Response:
        """One job."""
        return json_of(await self._calls(self._tracking.get, *_target(request)))

    def _changer(self, action: wire.JobAction) -> Callable[[Request], object]:
        async def change(request: Request) -> Response:
            """Request a change of a job."""
            check_trainer(principal_of(request.scope))
            return json_of(await self._calls(self._tracking.change, *_target(request), action))

        return change

    async def events(self, request: Request) -> Response:
        """Events of a job after the id `after`, oldest first: a page, JSON lines, or a stream until the job ends."""
        target, after = _target(request), request.query_params.get("after")
        if wants_stream(request) or wants_lines(request):
            after = after or request.headers.get("last-event-id")
            feed = await self._calls(self._tracking.event_feed, *target, after)
            return await LineStream(feed, self._calls, self._streams, lambda event: event.id).response(request)
        return json_of(
            await self._calls(self._tracking.events, *target, after=after, limit=page_limit(request, 100, 1000))
        )

    async def logs(self, request: Request) -> Response:
        """The log of an attempt from a line on: JSON lines of what there is, or a stream until the attempt ends."""
        attempt, line = query_number(request, "attempt", 1, LARGEST), query_number(request, "line", 1, LARGEST)
        if wants_stream(request) and line is None and (last := request.headers.get("last-event-id")):
            attempt, line = _line_after(last)
        feed = await self._calls(self._tracking.log_feed, *_target(request), attempt=attempt, line=line or 1)
        lines = LineStream(feed, self._log_calls, self._streams, lambda each: f"{each.attempt}.{each.line}")
        return await lines.response(request)

    async def metrics(self, request: Request) -> Response:
        """Metric series of a training job; `name` may be repeated."""
        after_step = query_number(request, "after_step", 0, LARGEST)
        found = await self._calls(
            self._tracking.metrics,
            *_target(request),
            names=request.query_params.getlist("name"),
            after_step=-1 if after_step is None else after_step,
        )
        return json_of(found)

    async def lineage(self, request: Request) -> Response:
        """What a job was made from, and what was made of it."""
        return json_of(await self._calls(self._tracking.lineage, *_target(request)))

    async def queue(self, request: Request) -> Response:
        """Jobs and requests by state, and the jobs that wait."""
        return json_of(await self._calls(self._tracking.queue, visible_tenant(request)))


def json_of(answer: BaseModel) -> Response:
    """The response with a wire model."""
    # Not by JSONResponse: a loss that is not a number becomes null.
    return Response(answer.model_dump_json(), media_type="application/json")


def visible_tenant(request: Request) -> str | None:
    """The tenant whose jobs the caller sees; None: all."""
    principal = principal_of(request.scope)
    return request.query_params.get("tenant") if principal.sees_all else principal.tenant


def _target(request: Request) -> tuple[str, str | None]:
    principal = principal_of(request.scope)
    return request.path_params["job_id"], None if principal.sees_all else principal.tenant


def _choices(request: Request, name: str, choices: type[E]) -> list[E] | None:
    """The values of a filter; None without any, ApiError 400 for one that there is not."""
    found = request.query_params.getlist(name)
    known = [choice.value for choice in choices]
    for value in found:
        if value not in known:
            hint = did_you_mean(value, known)
            raise ApiError(400, f"There is no {name} {value!r}.{hint} There are {', '.join(known)}.", param=name)
    return [choices(value) for value in found] or None


def _line_after(event_id: str) -> tuple[int, int]:
    """Attempt and number of the line after the one of a stream's event; ApiError 400 for other texts."""
    attempt, _, line = event_id.partition(".")
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in (attempt, line)):
        raise ApiError(400, "`Last-Event-ID` is not the id of a line of this stream.", param="Last-Event-ID")
    return int(attempt), int(line) + 1
