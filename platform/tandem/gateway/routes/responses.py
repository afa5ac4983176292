"""Routes of stored responses: show, input items, delete. What `/v1/responses` cannot do is refused, with the alternative."""

from __future__ import annotations

from typing import Any

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tandem.gateway.errors import ApiError
from tandem.gateway.identity.authentication import principal_of, tenant_of
from tandem.gateway.requests.query import order_of, page_limit
from tandem.gateway.stored.pages import cut_page, item_page
from tandem.gateway.stored.service import StoredAnswerService
from tandem.stored.conversation import listed_items
from tandem.stored.records import AnswerKind, StoredAnswer

PATH = "/v1/responses"
ALTERNATIVE = (
    "Send the whole conversation in `input`: what was said before, and the items of `output` that were answered."
)
UNSUPPORTED_FIELDS = {
    "conversation": f"Conversations are not stored here. {ALTERNATIVE}",
    "background": "Responses are not made in the background here. Use `stream` to see a long one grow.",
}
NOT_STORED_FIELDS = {
    "previous_response_id": f"Responses are not stored here, so none can be gone on from. {ALTERNATIVE}",
    "store": "Responses are not stored here. Leave `store` out, or set it to false.",
}
"""Refused where `gateway.stored.enabled` is false."""


def check(body: dict[str, Any], *, can_store: bool) -> None:
    """ApiError 400 for a request that needs what is not there."""
    for key, reason in (UNSUPPORTED_FIELDS if can_store else UNSUPPORTED_FIELDS | NOT_STORED_FIELDS).items():
        if body.get(key):
            raise ApiError(400, f"`{key}`: {reason}", code="unsupported_parameter", param=key)


class ResponseRoutes:
    """The route handlers."""

    def __init__(self, service: StoredAnswerService) -> None:
        self._service = service

    def routes(self) -> list[BaseRoute]:
        """The routes for Starlette."""
        response = f"{PATH}/{{response_id}}"
        return [
            Route(response, self.show),
            Route(response, self.delete, methods=["DELETE"]),
            Route(f"{response}/cancel", self.cancel, methods=["POST"]),
            Route(f"{response}/input_items", self.input_items),
        ]

    async def show(self, request: Request) -> Response:
        """A stored response."""
        if request.query_params.get("stream") == "true":
            raise ApiError(400, "`stream`: A stored response is not streamed again. Leave it out.", param="stream")
        return await self._service.encoded(to_json, dict((await self._find(request)).answer))

    async def delete(self, request: Request) -> Response:
        """Delete a stored response with its input; conversations cannot go on from it, nor from those after it."""
        stored = await self._find(request)
        tenant = tenant_of(principal_of(request.scope))
        await self._service.calls(self._service.store.delete, tenant, AnswerKind.RESPONSE, stored.id)
        return JSONResponse({"id": stored.id, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        """Refused: only responses made in the background can be cancelled."""
        stored = await self._find(request)
        raise ApiError(400, f"The response {stored.id} has ended; only background responses can be cancelled.")

    async def input_items(self, request: Request) -> Response:
        """The input items of a stored response's own request, without the conversation that it goes on from."""
        items = listed_items(await self._find(request))
        newest_first = order_of(request, "desc") == "desc"
        page = cut_page(items[::-1] if newest_first else items, request, page_limit(request, 20, 100))
        return await self._service.encoded(item_page, *page)

    async def _find(self, request: Request) -> StoredAnswer:
        tenant, response_id = tenant_of(principal_of(request.scope)), request.path_params["response_id"]
        found = await self._service.find(tenant, AnswerKind.RESPONSE, response_id)
        if found is None:
            raise ApiError(
                404,
                f"Response with id '{response_id[:80]}' not found. Responses are stored for requests with `store` alone, and "
                f"deleted after {self._service.config.days} days (gateway.stored.days).",
                code="response_not_found",
            )
        return found
