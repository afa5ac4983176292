"""Pages of stored answers and of their parts, as OpenAI's lists have them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request

from tandem.gateway.errors import ApiError


def item_page(items: Sequence[Mapping[str, Any]], has_more: bool) -> dict[str, Any]:
    """One page of objects with ids."""
    return {
        "object": "list",
        "data": list(items),
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": has_more,
    }


def cut_page(
    items: Sequence[Mapping[str, Any]], request: Request, limit: int
) -> tuple[Sequence[Mapping[str, Any]], bool]:
    """At most `limit` items behind the id `after` of the query, and whether there are more; ApiError 400 for an unknown id."""
    after = request.query_params.get("after")
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise ApiError(400, f"`after` is {after[:80]!r}, which is no id of this list.", param="after")
    start = 0 if after is None else ids.index(after) + 1
    return items[start : start + limit], len(items) > start + limit


def order_of(request: Request, default: str) -> str:
    """`order` of the query, asc or desc; ApiError 400 for another word."""
    order = request.query_params.get("order", default)
    if order not in ("asc", "desc"):
        raise ApiError(400, f"`order` is {order[:20]!r}; it must be asc or desc.", param="order")
    return order


def metadata_filter(request: Request) -> dict[str, str]:
    """The metadata that a list is filtered by: `metadata[KEY]=VALUE` in the query."""
    wanted = {}
    for name, value in request.query_params.multi_items():
        if name.startswith("metadata[") and name.endswith("]"):
            key = name[len("metadata[") : -1]
            if '"' in key or "\\" in key:
                raise ApiError(
                    400, "A list cannot be filtered by a key with a quote or backslash in it.", param="metadata"
                )
            wanted[key] = value
    return wanted
