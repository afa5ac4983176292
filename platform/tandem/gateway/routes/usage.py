"""Admin routes for usage and for the limits of tenants."""

from __future__ import annotations

import csv
import io
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response

from tandem.api.keys import KeyLimits
from tandem.api.usage import ListedTenant, Tenant, TenantList, UsagePage
from tandem.auth import KeyStore, Limits
from tandem.gateway.routes.management import actor, run_blocking, with_timezone
from tandem.usage import UsageStore
from tandem.usage.store import COUNTS

PAGE = 10_000
DEFAULT_SPAN = timedelta(days=30)


class UsageRoutes:
    """The route handlers."""

    def __init__(self, usage: UsageStore, keys: KeyStore, retry_after_s: int = 5) -> None:
        self._usage = usage
        self._keys = keys
        self._retry_after_s = retry_after_s

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to the app of management routes."""
        app.get("/usage", response_model=UsagePage)(self.sums)
        app.get("/tenants")(self.list_tenants)
        app.put("/tenants/{tenant}/limits")(self.limit)

    async def sums(
        self,
        by: Annotated[str, Query(max_length=100)] = "tenant,key_id,model",
        since: datetime | None = None,
        until: datetime | None = None,
        tenant: Annotated[str | None, Query(max_length=63)] = None,
        offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
        limit: Annotated[int, Query(ge=1, le=PAGE)] = 1000,
        format: Literal["json", "csv"] = "json",  # noqa: A002 - the parameter in the query
    ) -> Any:
        """Requests and tokens, summed by the columns `by` (with commas: hour, day, tenant, key_id, model, adapter, route).

        `since`, `until`: ISO 8601, without a zone in UTC; by default the last 30 days. Counts are kept by the hour.
        """
        columns = [column.strip() for column in by.split(",") if column.strip()]
        rows = await run_blocking(
            self._usage.sums,
            columns,
            since=with_timezone(since, "since") or datetime.now(UTC) - DEFAULT_SPAN,
            until=with_timezone(until, "until"),
            tenant=tenant,
            offset=offset,
            limit=limit + 1,
            retry_after_s=self._retry_after_s,
        )
        page = rows[:limit]
        if format == "csv":
            text = io.StringIO()
            writer = csv.DictWriter(text, [*columns, *COUNTS])
            writer.writeheader()
            writer.writerows(page)
            return Response(text.getvalue(), media_type="text/csv")
        return UsagePage(data=page, has_more=len(rows) > limit)

    async def list_tenants(self) -> TenantList:
        """The tenants that have limits or active keys."""
        tenants = await run_blocking(self._keys.tenant_summaries, retry_after_s=self._retry_after_s)
        return TenantList(
            data=[
                ListedTenant(tenant=tenant.name, limits=_limits(tenant.limits), keys=tenant.keys) for tenant in tenants
            ]
        )

    async def limit(self, tenant: str, limits: KeyLimits, request: Request) -> Tenant:
        """Replace the limits of a tenant. Gateways follow within 5 seconds."""
        new_limits = Limits(**limits.model_dump())
        await run_blocking(
            self._keys.limit_tenant,
            tenant,
            new_limits,
            retry_after_s=self._retry_after_s,
            **actor(request),
        )
        return Tenant(tenant=tenant, limits=_limits(new_limits))


def _limits(limits: Limits) -> KeyLimits:
    return KeyLimits(**limits.to_json())
