"""Stored responses of `/v1/responses`: refused, with the alternative.

vLLM stores a response in the memory of the replica that made it; other replicas, and the same one after a restart, do not have
it. So nothing is stored, and each request carries its conversation.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Route

from tandem.gateway.errors import ApiError

PATH = "/v1/responses"
ALTERNATIVE = (
    "Send the whole conversation in `input`: what was said before, and the items of `output` that were answered."
)
UNSUPPORTED_FIELDS = {
    "previous_response_id": f"Responses are not stored here, so none can be gone on from. {ALTERNATIVE}",
    "conversation": f"Conversations are not stored here. {ALTERNATIVE}",
    "background": "Responses are not stored here, so none can be fetched later. Use `stream` to see a long one grow.",
    "store": "Responses are not stored here. Leave `store` out, or set it to false.",
}


def check(body: dict[str, Any]) -> None:
    """ApiError 400 for a request that needs stored responses; sets `store` to false in all others."""
    for key, reason in UNSUPPORTED_FIELDS.items():
        if body.get(key):
            raise ApiError(400, f"`{key}`: {reason}", code="unsupported_parameter", param=key)
    body["store"] = False


def routes() -> list[BaseRoute]:
    """The routes of stored responses, which answer 404 with the reason."""
    return [
        Route(f"{PATH}/{{response_id}}", _not_stored, methods=["GET", "DELETE"]),
        Route(f"{PATH}/{{response_id}}/cancel", _not_stored, methods=["POST"]),
        Route(f"{PATH}/{{response_id}}/input_items", _not_stored, methods=["GET"]),
    ]


async def _not_stored(request: Request) -> None:
    name = request.path_params["response_id"]
    raise ApiError(
        404, f"The response {name!r} is not here: responses are not stored. {ALTERNATIVE}", code="response_not_found"
    )
