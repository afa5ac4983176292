"""Native routes of what tenants use and what the cluster has: `/v1/tandem/usage`, `/v1/tandem/capacity`."""

from __future__ import annotations

from datetime import UTC, datetime

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tandem.api.usage import UsagePage
from tandem.gateway.errors import ApiError
from tandem.gateway.identity.authentication import principal_of
from tandem.gateway.requests.query import page_limit, query_number
from tandem.gateway.routes.jobs import json_of, visible_tenant
from tandem.gateway.routes.management import with_timezone
from tandem.gateway.routes.usage import DEFAULT_SPAN, PAGE
from tandem.gateway.work.calls import WorkCalls
from tandem.jobs.tracking.capacity import CapacityRecords
from tandem.usage import UsageStore

USAGE_PATH, CAPACITY_PATH = "/v1/tandem/usage", "/v1/tandem/capacity"
DEFAULT_COLUMNS = "hour,key_id,model"
LONGEST_COLUMNS = 100
"""Characters of `by`."""


class ConsumptionRoutes:
    """The route handlers. A key sees its tenant, an admin's all, as does everybody in an app without keys."""

    def __init__(self, usage: UsageStore, capacity: CapacityRecords, calls: WorkCalls) -> None:
        self._usage = usage
        self._capacity = capacity
        self._calls = calls

    def routes(self) -> list[BaseRoute]:
        """The routes for Starlette."""
        return [Route(USAGE_PATH, self.usage), Route(CAPACITY_PATH, self.capacity)]

    async def usage(self, request: Request) -> Response:
        """Requests and tokens, summed by the columns `by`, as at `/admin/usage`: `limit` sums after the first `offset` ones."""
        query, limit = request.query_params, page_limit(request, 1000, PAGE)
        by = query.get("by", DEFAULT_COLUMNS)
        if len(by) > LONGEST_COLUMNS:
            raise ApiError(400, f"`by` has {len(by)} characters; at most {LONGEST_COLUMNS} are taken.", param="by")
        rows = await self._calls(
            self._usage.sums,
            [column.strip() for column in by.split(",") if column.strip()],
            since=_time(request, "since") or datetime.now(UTC) - DEFAULT_SPAN,
            until=_time(request, "until"),
            tenant=visible_tenant(request),
            offset=query_number(request, "offset", 0, 2**31) or 0,
            limit=limit + 1,
        )
        return json_of(UsagePage(data=rows[:limit], has_more=len(rows) > limit))

    async def capacity(self, request: Request) -> Response:
        """CPUs and GPUs of the cluster, and the caller's share of them."""
        # Without keys there are no tenants to choose from.
        tenant = visible_tenant(request) if principal_of(request.scope).key_id else None
        return json_of(await self._calls(self._capacity.read, tenant))


def _time(request: Request, name: str) -> datetime | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    try:
        return with_timezone(datetime.fromisoformat(text), name)
    except ValueError:
        raise ApiError(
            400, f"`{name}` is {text[:40]!r}; it must be a time such as 2026-11-30T08:00.", param=name
        ) from None
