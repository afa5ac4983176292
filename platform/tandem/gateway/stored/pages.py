"""Pages of stored answers and of their parts, as OpenAI's lists have them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import to_json
from starlette.requests import Request

from tandem.gateway.errors import ApiError
from tandem.gateway.requests.query import metadata_pairs


def item_page(items: Sequence[Mapping[str, Any]], has_more: bool) -> bytes:
    """One page of objects with ids, as JSON.

    Each object is encoded by itself, so that a thread that does this lets the event loop go on in between.
    """
    first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
    end = to_json({"first_id": first, "last_id": last, "has_more": has_more})
    return b'{"object":"list","data":[' + b",".join(map(to_json, items)) + b"]," + end.removeprefix(b"{")


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


def metadata_filter(request: Request) -> dict[str, str]:
    """The metadata that a list is filtered by: `metadata[KEY]=VALUE` in the query."""
    wanted = metadata_pairs(request)
    if any('"' in key or "\\" in key for key in wanted):
        raise ApiError(400, "A list cannot be filtered by a key with a quote or backslash in it.", param="metadata")
    return wanted
