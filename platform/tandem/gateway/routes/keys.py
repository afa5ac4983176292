"""Admin routes for API keys: create, list, show, rotate, revoke."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response

from tandem.api.keys import CreatedKey, Key, KeyCreation, KeyList, KeyRotation
from tandem.auth import ApiKey, KeyStore, Limits, NewKey, Role
from tandem.auth.keys import KEY_ID
from tandem.auth.model_names import unregistered
from tandem.gateway.errors import ApiError
from tandem.gateway.routes.conditions import condition_of
from tandem.gateway.routes.management import actor, run_blocking
from tandem.gateway.routes.openapi.operations import IDEMPOTENCY_KEY
from tandem.registry import Registry

PAGE = 1000


class KeyRoutes:
    """The route handlers. Gateways accept a new key, and refuse a revoked one, within 5 seconds."""

    def __init__(self, store: KeyStore, registry: Registry, served: Iterable[str] = (), retry_after_s: int = 5) -> None:
        """`served`: names that the app's models answer to, registered or not."""
        self._store = store
        self._registry = registry
        self._served = tuple(served)
        self._retry_after_s = retry_after_s
        # Of its own: a key can be revoked while other management waits for a disk or an object store.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="key-routes")

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to the app of management routes."""
        key_path = "/keys/{id}"
        app.get("/keys")(self.list_keys)
        once = {"parameters": [IDEMPOTENCY_KEY]}
        app.post("/keys", status_code=201, openapi_extra=once)(self.create)
        app.get(key_path)(self.show)
        app.post(f"{key_path}/rotate", status_code=201, openapi_extra=once)(self.rotate)
        app.post(f"{key_path}/revoke")(self.revoke)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False)
        self._store.close()

    async def list_keys(
        self,
        tenant: Annotated[str | None, Query(max_length=63)] = None,
        all: bool = False,  # noqa: A002 - the parameter in the query
        after: Annotated[str | None, Query(max_length=64)] = None,
        limit: Annotated[int, Query(ge=1, le=PAGE)] = 100,
    ) -> KeyList:
        """Active keys or (`all=true`) all, oldest first; of one `tenant` or of all; `limit` of them after the id `after`."""
        keys = await self._run(self._store.page, tenant=tenant, every=all, after=after, limit=limit + 1)
        page = keys[:limit]
        last_id = page[-1].id if len(keys) > limit else None
        return KeyList(data=[_to_key(key) for key in page], has_more=last_id is not None, last_id=last_id)

    async def create(self, creation: KeyCreation, request: Request, response: Response) -> CreatedKey:
        """Make a key. Its secret is in this answer and in no other.

        `Idempotency-Key`: sent again within 10 minutes, the request makes no second key; 409 names the first one.
        """
        # Before the key is made: after it an error would lose the secret.
        warnings = await self._run(unregistered, self._registry, creation.models, self._served)
        new: NewKey = await self._run(
            self._store.create,
            creation.name,
            tenant=creation.tenant,
            role=Role(creation.role),
            models=creation.models,
            limits=Limits(**creation.limits.model_dump()),
            expires_in=None if creation.expires_in_s is None else timedelta(seconds=creation.expires_in_s),
            **actor(request),
            once=condition_of(request),
        )
        return _created_key(new, response, warnings)

    async def show(self, id: str) -> Key:  # noqa: A002 - the parameter in the path
        """One key."""
        return _to_key(await self._run(self._store.get, _valid_key_id(id)))

    async def rotate(
        self,
        id: str,  # noqa: A002 - the parameter in the path
        request: Request,
        response: Response,
        rotation: KeyRotation | None = None,
    ) -> CreatedKey:
        """Replace a key by a new one with the same rights; the old one is accepted for `overlap_s` more, a day by default.

        `Idempotency-Key` as when a key is made.
        """
        overlap = timedelta(seconds=(rotation or KeyRotation()).overlap_s)
        new = await self._run(
            self._store.rotate, _valid_key_id(id), overlap=overlap, **actor(request), once=condition_of(request)
        )
        return _created_key(new, response, [])

    async def revoke(self, id: str, request: Request) -> Key:  # noqa: A002 - the parameter in the path
        """End a key. One that has ended stays as it is."""
        return _to_key(await self._run(self._store.revoke, _valid_key_id(id), **actor(request)))

    async def _run(self, work: Any, *args: Any, **options: Any) -> Any:
        return await run_blocking(work, *args, retry_after_s=self._retry_after_s, threads=self._threads, **options)


def _valid_key_id(key_id: str) -> str:
    """The id in a path; ApiError 404 for a text that is none, such as a name."""
    if not KEY_ID.fullmatch(key_id):
        raise ApiError(404, "There is no key of that id; GET /admin/keys lists them.", code="key_not_found", param="id")
    return key_id


def _to_key(key: ApiKey) -> Key:
    return Key.model_validate(key.to_json())


def _created_key(new: NewKey, response: Response, warnings: list[str]) -> CreatedKey:
    response.headers["Cache-Control"] = "no-store"
    return CreatedKey.model_validate(new.key.to_json() | {"secret": new.secret, "warnings": warnings})
