"""Admin routes: register, list, promote, roll back, pin and delete adapters; adapters resident at each replica.

`Authentication` lets keys with the role admin through, and TANDEM_ADMIN_TOKEN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request, Response

from tandem.api.adapters import (
    Adapter,
    AdapterDetails,
    AdapterList,
    AdapterPromotion,
    AdapterRegistration,
    AdapterResidency,
    DeletedAdapters,
    ListedAdapter,
    PinnedAdapter,
    ReplicaAdapters,
    UnpinnedAdapter,
)
from tandem.config.serving.app import GatewayConfig
from tandem.gateway.adapter_sources import check_source
from tandem.gateway.identity.audit_writer import AuditWriter
from tandem.gateway.replicas.fleet import Fleet
from tandem.gateway.routes.audit import AuditedChanges
from tandem.gateway.routes.conditions import condition_of
from tandem.gateway.routes.management import run_blocking
from tandem.gateway.routes.openapi.operations import IDEMPOTENCY_KEY
from tandem.ids import split_version
from tandem.jobs.adapter_entries import deletion_fields, registration_fields
from tandem.jobs.adapters import Adapters
from tandem.registry import ModelRecord
from tandem.settings import settings

T = TypeVar("T")

PAGE = 1000
MAX_REGISTRATIONS = 4
"""Registrations at a time: stores that hang must not take the threads that other changes need."""


class AdminRoutes:
    """The route handlers."""

    def __init__(self, adapters: Adapters, fleet: Fleet, audit: AuditWriter, config: GatewayConfig) -> None:
        self._retry_after_s = config.retry_after_s
        self._sources = config.adapter_sources
        self._adapters = adapters
        self._audited_changes = AuditedChanges(audit, lambda name: adapters.registry.summary(split_version(name)[0]))
        self._fleet = fleet
        self._registration_threads = ThreadPoolExecutor(MAX_REGISTRATIONS, thread_name_prefix="register")

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to the app of management routes."""
        adapter_path = "/adapters/{name}"
        app.get("/adapters")(self.list_adapters)
        app.post("/adapters", status_code=201)(self.register)
        app.get("/residency")(self.residency)
        app.get(adapter_path)(self.show)
        app.delete(adapter_path)(self.delete)
        once = {"parameters": [IDEMPOTENCY_KEY]}
        app.post(f"{adapter_path}/promote", openapi_extra=once)(self.promote)
        app.post(f"{adapter_path}/roll-back", openapi_extra=once)(self.roll_back)
        app.post(f"{adapter_path}/pin")(self.pin)
        app.post(f"{adapter_path}/unpin")(self.unpin)

    async def list_adapters(
        self,
        all: bool = False,  # noqa: A002 - the parameter in the query
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=PAGE)] = 100,
    ) -> AdapterList:
        """Adapters by name, the promoted version of each or (`all=true`) all; `limit` of them after `after`."""
        records = await self._run(self._adapters.list, all, after=after, limit=limit + 1)
        page = records[:limit]
        last_id = (page[-1].id if all else page[-1].name) if len(records) > limit else None
        marks = await self._run(self._adapters.marks, page)
        data = [ListedAdapter(**(_fields(record) | marks[record.id])) for record in page]
        return AdapterList(data=data, has_more=last_id is not None, last_id=last_id)

    async def register(self, registration: AdapterRegistration, request: Request) -> Adapter:
        """Register an adapter, see Adapters.register."""
        fields = registration.model_dump()
        name, source = fields.pop("name"), fields.pop("source")
        await self._run(check_source, source, self._sources, settings().root)
        work = functools.partial(self._adapters.register, name, source, **fields)
        return Adapter(**_fields(await self._change(request, "register", name, work, registration_fields)))

    async def show(self, name: str, response: Response) -> AdapterDetails:
        """One adapter, the history of its name, and the replicas that hold it; `ETag` is what the name means, for `If-Match`."""
        record = await self._run(self._adapters.registry.resolve, name)
        history = await self._run(self._adapters.promotions, record.name)
        current_id = next((promotion.id for promotion in history if not promotion.taken_back), None)
        if current_id is not None:
            response.headers["ETag"] = f'"{current_id}"'
        return AdapterDetails(
            **_fields(record),
            promotions=[
                AdapterPromotion(id=promotion.id, at=promotion.at.isoformat(), taken_back=promotion.taken_back)
                for promotion in history
            ],
            replicas=[entry.replica for entry in self._replicas() if record.id in entry.in_memory],
        )

    async def promote(self, name: str, request: Request) -> Adapter:
        """Make a version (`name@version` in the path) the one that its name resolves to.

        `If-Match`: id that the name must mean until then, else 412. `Idempotency-Key`: sent again, it changes nothing.
        """
        work = functools.partial(self._adapters.promote, name, condition_of(request))
        return Adapter(**_fields(await self._change(request, "promote", name, work)))

    async def roll_back(self, name: str, request: Request) -> Adapter:
        """Resolve a name to the version promoted before; `If-Match` and `Idempotency-Key` as for a promotion."""
        work = functools.partial(self._adapters.roll_back, name, condition_of(request))
        return Adapter(**_fields(await self._change(request, "roll_back", name, work)))

    async def pin(self, name: str, request: Request) -> PinnedAdapter:
        """Keep an adapter loaded on every replica of its base."""
        work = functools.partial(self._adapters.pin, name)
        return PinnedAdapter(**_fields(await self._change(request, "pin", name, work)))

    async def unpin(self, name: str, request: Request) -> UnpinnedAdapter:
        """Undo `pin`."""
        work = functools.partial(self._adapters.unpin, name)
        return UnpinnedAdapter(id=name, was_pinned=await self._change(request, "unpin", name, work))

    async def delete(self, name: str, request: Request) -> DeletedAdapters:
        """Delete a version, or all versions of a name."""
        work = functools.partial(self._adapters.delete, name)
        deleted = await self._change(request, "delete", name, work, deletion_fields)
        return DeletedAdapters(deleted=[record.id for record in deleted])

    async def residency(self) -> AdapterResidency:
        """Each replica with the adapters in its slots and its memory, and the pinned ones that it could not load."""
        return AdapterResidency(data=self._replicas())

    def _replicas(self) -> list[ReplicaAdapters]:
        return [
            ReplicaAdapters(
                replica=replica.id,
                base=replica.pool,
                state=replica.state,
                in_slots=list(replica.slots),
                in_memory=list(replica.adapters),
                loads=replica.adapter_loads,
                not_kept=dict(replica.pin_problems),
            )
            for replica in self._fleet.replicas
        ]

    async def _change(
        self,
        request: Request,
        verb: str,
        name: str,
        work: Callable[[], T],
        entry_fields: Callable[[T], dict[str, Any]] = lambda result: {},
    ) -> T:
        """A change of an adapter, with its entry in the audit log."""
        threads = self._registration_threads if verb == "register" else None
        return await self._run(
            self._audited_changes, request, f"adapters.{verb}", name, work, entry_fields, threads=threads
        )

    async def _run(self, work: Callable[..., T], *args: Any, **options: Any) -> T:
        return await run_blocking(work, *args, retry_after_s=self._retry_after_s, **options)


def _fields(record: ModelRecord) -> dict[str, Any]:
    """The fields of an `Adapter`."""
    return {
        "id": record.id,
        "name": record.name,
        "version": record.version,
        "base": record.base,
        "rank": record.rank,
        "source": record.location,
        "digest": record.digest,
        "lineage": record.lineage,
        "created_at": record.created_at.isoformat(),
        "tenant": record.tenant,
    }
