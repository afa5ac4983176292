"""Request headers that make a change conditional: `If-Match` (RFC 9110) and `Idempotency-Key`."""

from __future__ import annotations

import hashlib

from starlette.requests import Request

from tandem.gateway.errors import ApiError, path_below
from tandem.gateway.identity.authentication import principal_of
from tandem.registry.conditions import Condition

LONGEST_KEY = 255
"""Longest idempotency key, in characters."""


def condition_of(request: Request) -> Condition:
    """The condition that a request's headers state; ApiError 400 for headers that cannot be.

    An idempotency key counts for one caller and one path.
    """
    expected = request.headers.get("if-match", "*").strip()
    if expected != "*" and not (len(expected) > 2 and expected[0] == expected[-1] == '"' and "," not in expected):
        raise ApiError(
            400, '`If-Match` must be one id in quotes, such as "my-adapter@1", as `ETag` has it.', param="If-Match"
        )
    key = idempotency_key_of(request)
    return Condition(
        expected=None if expected == "*" else expected[1:-1],
        once=None if key is None else _digest(principal_of(request.scope).key_id, path_below(request.scope), key),
    )


def idempotency_key_of(request: Request) -> str | None:
    """The header `Idempotency-Key`; None without one, ApiError 400 for one that is too long."""
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= LONGEST_KEY:
        raise ApiError(
            400,
            f"`Idempotency-Key` has {len(key)} characters; it must have 1 to {LONGEST_KEY}.",
            param="Idempotency-Key",
        )
    return key


def _digest(*parts: str | None) -> str:
    return hashlib.sha256("\0".join(part or "" for part in parts).encode()).hexdigest()
