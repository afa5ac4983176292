"""Admin routes: register, list, promote, roll back, pin and delete adapters; adapters resident at each replica.

`Authentication` lets keys with the role admin through, and TANDEM_ADMIN_TOKEN.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tandem.errors import (
    ConfigError,
    JobError,
    RegistryError,
    RegistryUnreachableError,
    StorageError,
    UnknownModelError,
    did_you_mean,
)
from tandem.gateway.errors import ApiError, no_registry
from tandem.gateway.fleet import Fleet
from tandem.gateway.routes.openai import int_parameter, parse_body, read_body
from tandem.jobs.adapters import Adapters
from tandem.registry import ModelRecord

T = TypeVar("T")

MAX_BODY_BYTES = 64 * 1024
PAGE = 1000
KEYS = {"name": str, "source": str, "base": str, "promote": bool}


class AdminRoutes:
    """The route handlers."""

    def __init__(self, adapters: Adapters, fleet: Fleet, retry_after_s: int = 5) -> None:
        self._retry_after_s = retry_after_s
        self._adapters = adapters
        self._fleet = fleet

    def routes(self) -> list[BaseRoute]:
        """The routes for Starlette."""
        one = "/admin/adapters/{name}"
        return [
            Route("/admin/adapters", self.list_adapters, methods=["GET"]),
            Route("/admin/adapters", self.register, methods=["POST"]),
            Route("/admin/residency", self.residency, methods=["GET"]),
            Route(one, self.show, methods=["GET"]),
            Route(one, self.delete, methods=["DELETE"]),
            Route(f"{one}/promote", self.promote, methods=["POST"]),
            Route(f"{one}/roll-back", self.roll_back, methods=["POST"]),
            Route(f"{one}/pin", self.pin, methods=["POST"]),
            Route(f"{one}/unpin", self.unpin, methods=["POST"]),
        ]

    async def list_adapters(self, request: Request) -> Response:
        """Adapters by name, the promoted version of each or (`all=true`) all; `limit` of them after `after`."""
        limit = int_parameter(request, "limit", 100, PAGE)
        every = request.query_params.get("all") == "true"
        found = await self._do(self._adapters.list, every, after=request.query_params.get("after"), limit=limit + 1)
        shown = found[:limit]
        last = (shown[-1].id if every else shown[-1].name) if len(found) > limit else None
        marks = await self._do(self._adapters.marks, shown)
        data = [to_json(record) | marks[record.id] for record in shown]
        return JSONResponse({"object": "list", "data": data, "has_more": last is not None, "last_id": last})

    async def register(self, request: Request) -> Response:
        """{"name", "source", "base", "promote"}: see Adapters.register."""
        body = parse_body(await read_body(request, MAX_BODY_BYTES))
        for key, value in body.items():
            if key not in KEYS:
                raise ApiError(400, f"{key!r} is not known here.{did_you_mean(key, KEYS)}", param=key)
            if not isinstance(value, KEYS[key]):
                raise ApiError(400, f"`{key}` is {value!r}; it must be of type {KEYS[key].__name__}.", param=key)
        for key in ("name", "source"):
            if not body.get(key):
                raise ApiError(400, f"`{key}` is missing: what the adapter is called, and where it is.", param=key)
        name, source = body.pop("name"), body.pop("source")
        return JSONResponse(to_json(await self._do(self._adapters.register, name, source, **body)), status_code=201)

    async def show(self, request: Request) -> Response:
        """One adapter, the history of its name, and the replicas that hold it."""
        record = await self._do(self._adapters.registry.resolve, request.path_params["name"])
        history = await self._do(self._adapters.promotions, record.name)
        promotions = [{"id": p.id, "at": p.at.isoformat(), "taken_back": p.taken_back} for p in history]
        held = [entry["replica"] for entry in self._replicas() if record.id in entry["in_memory"]]
        return JSONResponse(to_json(record) | {"promotions": promotions, "replicas": held})

    async def promote(self, request: Request) -> Response:
        """Make a version (`name@version` in the path) the one that its name resolves to."""
        return JSONResponse(to_json(await self._do(self._adapters.promote, request.path_params["name"])))

    async def roll_back(self, request: Request) -> Response:
        """Resolve a name to the version promoted before."""
        return JSONResponse(to_json(await self._do(self._adapters.roll_back, request.path_params["name"])))

    async def pin(self, request: Request) -> Response:
        """Keep an adapter loaded on every replica of its base."""
        return JSONResponse(to_json(await self._do(self._adapters.pin, request.path_params["name"])) | {"pinned": True})

    async def unpin(self, request: Request) -> Response:
        """Undo `pin`."""
        name = request.path_params["name"]
        return JSONResponse({"id": name, "pinned": False, "was_pinned": await self._do(self._adapters.unpin, name)})

    async def delete(self, request: Request) -> Response:
        """Delete a version, or all versions of a name."""
        gone = await self._do(self._adapters.delete, request.path_params["name"])
        return JSONResponse({"deleted": [record.id for record in gone]})

    async def residency(self, request: Request) -> Response:
        """Each replica with the adapters in its slots and its memory, and the pinned ones that it could not load."""
        return JSONResponse({"object": "list", "data": self._replicas()})

    def _replicas(self) -> list[dict[str, Any]]:
        return [
            {
                "replica": replica.id,
                "base": replica.pool,
                "state": replica.state,
                "in_slots": list(replica.slots),
                "in_memory": list(replica.adapters),
                "loads": replica.adapter_loads,
                "not_kept": dict(replica.pin_problems),
            }
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


def to_json(record: ModelRecord) -> dict[str, Any]:
    """An adapter as JSON."""
    return {
        "id": record.id,
        "object": "adapter",
        "name": record.name,
        "version": record.version,
        "base": record.base,
        "rank": record.rank,
        "source": record.location,
        "digest": record.digest,
        "lineage": record.lineage,
        "created_at": record.created_at.isoformat(),
    }
