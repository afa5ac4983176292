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
from tandem.gateway.routes.audit import Audited, without_credentials
from tandem.gateway.routes.conditions import condition_of
from tandem.gateway.routes.management import run_blocking
from tandem.ids import split_version
from tandem.jobs.adapters import Adapters
from tandem.registry import ModelRecord
from tandem.settings import settings

T = TypeVar("T")

PAGE = 1000
REGISTRATIONS = 4
"""Registrations at a time: stores that hang must not take the threads that other changes need."""
LOGGED = 100
"""Deleted versions that the audit log names."""


class AdminRoutes:
    """The route handlers."""

    def __init__(self, adapters: Adapters, fleet: Fleet, audit: AuditWriter, config: GatewayConfig) -> None:
        self._retry_after_s = config.retry_after_s
        self._sources = config.adapter_sources
        self._adapters = adapters
        self._audited = Audited(audit, lambda name: adapters.registry.summary(split_version(name)[0]))
        self._fleet = fleet
        self._registering = ThreadPoolExecutor(REGISTRATIONS, thread_name_prefix="register")

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to the app of management routes."""
        one = "/adapters/{name}"
        app.get("/adapters")(self.list_adapters)
        app.post("/adapters", status_code=201)(self.register)
        app.get("/residency")(self.residency)
        app.get(one)(self.show)
        app.delete(one)(self.delete)
        app.post(f"{one}/promote")(self.promote)
        app.post(f"{one}/roll-back")(self.roll_back)
        app.post(f"{one}/pin")(self.pin)
        app.post(f"{one}/unpin")(self.unpin)

    async def list_adapters(
        self,
        all: bool = False,  # noqa: A002 - the parameter in the query
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=PAGE)] = 100,
    ) -> AdapterList:
        """Adapters by name, the promoted version of each or (`all=true`) all; `limit` of them after `after`."""
        found = await self._do(self._adapters.list, all, after=after, limit=limit + 1)
        shown = found[:limit]
        last = (shown[-1].id if all else shown[-1].name) if len(found) > limit else None
        marks = await self._do(self._adapters.marks, shown)
        data = [ListedAdapter(**(_fields(record) | marks[record.id])) for record in shown]
        return AdapterList(data=data, has_more=last is not None, last_id=last)

    async def register(self, registration: AdapterRegistration, request: Request) -> Adapter:
        """Register an adapter, see Adapters.register."""
        asked = registration.model_dump()
        name, source = asked.pop("name"), asked.pop("source")
        await self._do(check_source, source, self._sources, settings().root)
        work = functools.partial(self._adapters.register, name, source, **asked)
        return Adapter(**_fields(await self._change(request, "register", name, work, _registered)))

    async def show(self, name: str, response: Response) -> AdapterDetails:
        """One adapter, the history of its name, and the replicas that hold it; `ETag` is what the name means, for `If-Match`."""
        record = await self._do(self._adapters.registry.resolve, name)
        history = await self._do(self._adapters.promotions, record.name)
        meant = next((p.id for p in history if not p.taken_back), None)
        if meant is not None:
            response.headers["ETag"] = f'"{meant}"'
        return AdapterDetails(
            **_fields(record),
            promotions=[AdapterPromotion(id=p.id, at=p.at.isoformat(), taken_back=p.taken_back) for p in history],
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
        gone = await self._change(request, "delete", name, work, _deleted)
        return DeletedAdapters(deleted=[record.id for record in gone])

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
        more: Callable[[T], dict[str, Any]] = lambda result: {},
    ) -> T:
        """A change of an adapter, with its entry in the audit log."""
        threads = self._registering if verb == "register" else None
        return await self._do(self._audited, request, f"adapters.{verb}", name, work, more, threads=threads)

    async def _do(self, work: Callable[..., T], *args: Any, **options: Any) -> T:
        return await run_blocking(work, *args, retry_after_s=self._retry_after_s, **options)


def _registered(record: ModelRecord) -> dict[str, Any]:
    """What the audit log keeps of a version that was registered."""
    source = without_credentials(record.location)
    return {"id": record.id, "base": record.base, "source": source, "digest": record.digest}


def _deleted(records: list[ModelRecord]) -> dict[str, Any]:
    """The same of versions that were deleted."""
    return {"deleted": [record.id for record in records[:LOGGED]], "deleted_count": len(records)}


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
