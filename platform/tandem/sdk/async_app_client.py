"""Client of one served app for event loops.

async with tandem.AsyncClient() as client:
    async for event in client.jobs.events(job_id, follow=True):
        print(event.event, event.data)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Self

from tandem.api.jobs import TandemCapacity
from tandem.sdk.address import find_api_url
from tandem.sdk.jobs import requests
from tandem.sdk.jobs.async_client import AsyncJobs
from tandem.settings import settings

if TYPE_CHECKING:
    from openai import AsyncOpenAI


class AsyncClient:
    """`Client` for event loops: `jobs` has the app's jobs of every kind, `openai` its models."""

    def __init__(self, base_url: str | None = None, *, api_key: str | None = None) -> None:
        """`base_url`: with or without `/v1`; unset: TANDEM_API_URL, else the app of this home. `api_key`: else TANDEM_API_KEY."""
        self.base_url = find_api_url(base_url)
        self.api_key = api_key or settings().sent_key
        self.jobs = AsyncJobs(self.base_url, self.api_key)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close connections."""
        await self.jobs.close()

    def openai(self) -> AsyncOpenAI:
        """The `openai` SDK's client of this app."""
        from openai import AsyncOpenAI

        return AsyncOpenAI(base_url=self.base_url, api_key=self.api_key)

    async def capacity(self, *, tenant: str | None = None) -> TandemCapacity:
        """CPUs and GPUs of the app's cluster: total, used, free, with the age of the figures; quota and share of the tenant."""
        return await self.jobs.ask(requests.capacity_request(tenant))

    async def usage(
        self,
        by: Sequence[str] = ("hour", "key_id", "model"),
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        tenant: str | None = None,
    ) -> AsyncIterator[dict[str, Any]]:
        """Sums of requests and tokens by the columns `by`, one after the other; by default of the last 30 days.

        Columns: hour, day, tenant, key_id, model, adapter, route. `tenant`: of one alone, with an admin's key.
        """
        offset = 0
        while True:
            page = await self.jobs.ask(
                requests.usage_request(by, since=since, until=until, tenant=tenant, offset=offset)
            )
            for each in page.data:
                yield each
            if not page.has_more:
                return
            offset += len(page.data)
