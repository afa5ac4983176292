"""Query parameters that several lists have: numbers, page lengths, order, metadata."""

from __future__ import annotations

from starlette.requests import Request

from tandem.gateway.errors import ApiError


def query_number(request: Request, name: str, least: int, most: int) -> int | None:
    """A number in the query, None where it is not there; ApiError 400 for one that is not from `least` to `most`."""
    text = request.query_params.get(name)
    if text is None:
        return None
    # int() takes no text of thousands of digits.
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
        raise ApiError(400, f"`{name}` is {text[:20]!r}; it must be a number from {least} to {most}.", param=name)
    return int(text)


def page_limit(request: Request, default: int, most: int) -> int:
    """`limit` of a list; ApiError 400 for one that is not from 1 to `most`."""
    found = query_number(request, "limit", 1, most)
    return default if found is None else found


def order_of(request: Request, default: str) -> str:
    """`order` of a list, asc or desc; ApiError 400 for another word."""
    order = request.query_params.get("order", default)
    if order not in ("asc", "desc"):
        raise ApiError(400, f"`order` is {order[:20]!r}; it must be asc or desc.", param="order")
    return order


def metadata_pairs(request: Request) -> dict[str, str]:
    """The metadata that a list is filtered by: `metadata[KEY]=VALUE`."""
    return {
        name[len("metadata[") : -1]: value
        for name, value in request.query_params.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
