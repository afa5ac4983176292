"""Routes of stored chat completions: list, show, change of the metadata, delete, messages."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tandem.api.openai.fine_tuning import Metadata
from tandem.gateway.errors import ApiError
from tandem.gateway.identity.authentication import principal_of, tenant_of
from tandem.gateway.requests.query import order_of, page_limit
from tandem.gateway.stored.pages import cut_page, item_page, metadata_filter
from tandem.gateway.stored.service import StoredAnswerService
from tandem.gateway.work.calls import read_model
from tandem.stored.conversation import listed_messages
from tandem.stored.records import AnswerKind, StoredAnswer

PATH = "/v1/chat/completions"


class MetadataChange(BaseModel):
    """Body of a change."""

    model_config = ConfigDict(extra="forbid")

    metadata: Metadata | None


class ChatCompletionRoutes:
    """The route handlers."""

    def __init__(self, service: StoredAnswerService) -> None:
        self._service = service

    def routes(self) -> list[BaseRoute]:
        """The routes for Starlette."""
        completion = f"{PATH}/{{completion_id}}"
        return [
            Route(PATH, self.list_completions, methods=["GET"]),
            Route(completion, self.show),
            Route(completion, self.change, methods=["POST"]),
            Route(completion, self.delete, methods=["DELETE"]),
            Route(f"{completion}/messages", self.messages),
        ]

    async def list_completions(self, request: Request) -> Response:
        """Stored chat completions of the caller's tenant, oldest first, at most `limit` after the id `after`, and 16 MiB.

        `model` and `metadata[KEY]` filter them.
        """
        tenant, after = tenant_of(principal_of(request.scope)), request.query_params.get("after")
        limit = page_limit(request, 20, 100)
        await self._service.written(tenant)
        found = await self._service.calls(
            self._service.store.page,
            tenant,
            AnswerKind.CHAT,
            limit=limit,
            after=after,
            newest_first=order_of(request, "asc") == "desc",
            model=request.query_params.get("model"),
            metadata=metadata_filter(request),
        )
        if found is None:
            raise ApiError(400, f"`after` is {str(after)[:80]!r}, which is no stored chat completion.", param="after")
        completions = [completion_json(each) for each in found.answers]
        return await self._service.encoded(item_page, completions, found.has_more)

    async def show(self, request: Request) -> Response:
        """A stored chat completion."""
        return await self._service.encoded(to_json, completion_json(await self._find(request)))

    async def change(self, request: Request) -> Response:
        """Replace the metadata of a stored chat completion."""
        stored = await self._find(request)
        change = await read_model(request, MetadataChange)
        changed = await self._service.calls(
            self._service.store.set_metadata,
            tenant_of(principal_of(request.scope)),
            AnswerKind.CHAT,
            stored.id,
            change.metadata or {},
        )
        if changed is None:
            raise self._not_found(stored.id)
        return await self._service.encoded(to_json, completion_json(changed))

    async def delete(self, request: Request) -> Response:
        """Delete a stored chat completion with its messages."""
        stored = await self._find(request)
        tenant = tenant_of(principal_of(request.scope))
        await self._service.calls(self._service.store.delete, tenant, AnswerKind.CHAT, stored.id)
        return JSONResponse({"id": stored.id, "object": "chat.completion.deleted", "deleted": True})

    async def messages(self, request: Request) -> Response:
        """The messages of a stored chat completion's request."""
        messages = listed_messages(await self._find(request))
        newest_first = order_of(request, "asc") == "desc"
        page = cut_page(messages[::-1] if newest_first else messages, request, page_limit(request, 20, 100))
        return await self._service.encoded(item_page, *page)

    async def _find(self, request: Request) -> StoredAnswer:
        tenant, completion_id = tenant_of(principal_of(request.scope)), request.path_params["completion_id"]
        found = await self._service.find(tenant, AnswerKind.CHAT, completion_id)
        if found is None:
            raise self._not_found(completion_id)
        return found

    def _not_found(self, completion_id: str) -> ApiError:
        return ApiError(
            404,
            f"Chat completion with id '{completion_id[:80]}' not found. Completions are stored for requests with `store` alone, "
            f"and deleted after {self._service.config.days} days (gateway.stored.days).",
            code="completion_not_found",
        )


def completion_json(stored: StoredAnswer) -> dict[str, Any]:
    """A stored chat completion as its client got it, with its metadata."""
    return {**stored.answer, "metadata": dict(stored.metadata)}
