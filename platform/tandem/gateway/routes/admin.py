"""Admin routes: register, list, promote, roll back, pin and delete adapters; adapters resident at each replica.

`Authentication` lets keys with the role admin through, and TANDEM_ADMIN_TOKEN.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query

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
from tandem.errors import (
    ConfigError,
    JobError,
    RegistryError,
    RegistryUnreachableError,
    StorageError,
    UnknownModelError,
)
from tandem.gateway.adapter_sources import check_source
from tandem.gateway.errors import ApiError, no_registry
from tandem.gateway.fleet import Fleet
from tandem.gateway.routes.management import management_app
from tandem.jobs.adapters import Adapters
from tandem.registry import ModelRecord
from tandem.settings import settings

T = TypeVar("T")

PREFIX = "/admin"
PAGE = 1000


class AdminRoutes:
    """The route handlers."""

    def __init__(self, adapters: Adapters, fleet: Fleet, config: GatewayConfig) -> None:
        self._retry_after_s = config.retry_after_s
        self._sources = config.adapter_sources
        self._adapters = adapters
        self._fleet = fleet

    def app(self) -> FastAPI:
        """The app to mount at PREFIX."""
        app = management_app(PREFIX, "Tandem admin")
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
        return app

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

    async def register(self, registration: AdapterRegistration) -> Adapter:
        """Register an adapter, see Adapters.register."""
        asked = registration.model_dump()
        name, source = asked.pop("name"), asked.pop("source")
        await self._do(check_source, source, self._sources, settings().root)
        return Adapter(**_fields(await self._do(self._adapters.register, name, source, **asked)))

    async def show(self, name: str) -> AdapterDetails:
        """One adapter, the history of its name, and the replicas that hold it."""
        record = await self._do(self._adapters.registry.resolve, name)
        history = await self._do(self._adapters.promotions, record.name)
        return AdapterDetails(
            **_fields(record),
            promotions=[AdapterPromotion(id=p.id, at=p.at.isoformat(), taken_back=p.taken_back) for p in history],
            replicas=[entry.replica for entry in self._replicas() if record.id in entry.in_memory],
        )

    async def promote(self, name: str) -> Adapter:
        """Make a version (`name@version` in the path) the one that its name resolves to."""
        return Adapter(**_fields(await self._do(self._adapters.promote, name)))

    async def roll_back(self, name: str) -> Adapter:
        """Resolve a name to the version promoted before."""
        return Adapter(**_fields(await self._do(self._adapters.roll_back, name)))

    async def pin(self, name: str) -> PinnedAdapter:
        """Keep an adapter loaded on every replica of its base."""
        return PinnedAdapter(**_fields(await self._do(self._adapters.pin, name)))

    async def unpin(self, name: str) -> UnpinnedAdapter:
        """Undo `pin`."""
        return UnpinnedAdapter(id=name, was_pinned=await self._do(self._adapters.unpin, name))

    async def delete(self, name: str) -> DeletedAdapters:
        """Delete a version, or all versions of a name."""
        gone = await self._do(self._adapters.delete, name)
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

    async def _do(self, work: Callable[..., T], *args: Any, **options: Any) -> T:
        """Blocking work in a thread; its errors as ApiErrors."""
        try:
            return await asyncio.to_thread(work, *args, **options)
        except UnknownModelError as error:
            raise ApiError(404, str(error), code="model_not_found", param="name") from None
        except RegistryUnreachableError as error:
            raise no_registry(str(error), self._retry_after_s) from None
        except (RegistryError, ConfigError, JobError) as error:
            raise ApiError(400, str(error)) from None
        except StorageError as error:
            raise ApiError(503, str(error)) from None


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
    }
