"""Byte budget of a gateway: bodies of requests that are being read, wait, or may have to be sent again.

A body counts from its first byte (or from its Content-Length) until an engine has answered with its first byte; then no retry
needs it any more. Counted are bytes as they came; what a parser makes of them is bounded by `api.bounded_json` and gone before
the request waits.
"""

from __future__ import annotations

from tandem.gateway.errors import ApiError


class HeldBytes:
    """The bytes that one gateway holds."""

    def __init__(self, limit: int, retry_after_s: int) -> None:
        """`limit`: the most that may be held (`gateway.max_held_bytes`)."""
        self.limit = limit
        self.held = 0
        self._retry_after_s = retry_after_s

    def body(self) -> HeldBody:
        """The share of one more body, of which nothing has been read."""
        return HeldBody(self)

    def full(self, wanted: int) -> ApiError:
        """503 for a body that does not fit: the gateway's state is the cause, not the client's rate."""
        return ApiError(
            503,
            f"The gateway holds {self.held:,} bytes of other requests, and {wanted:,} more would exceed {self.limit:,} "
            f"(gateway.max_held_bytes). Try again in {self._retry_after_s} s.",
            code="gateway_full",
            headers={"Retry-After": str(self._retry_after_s)},
        )


class HeldBody:
    """What one body takes of the budget."""

    __slots__ = ("_bytes", "_of")

    def __init__(self, of: HeldBytes) -> None:
        self._of = of
        self._bytes = 0

    def grow_to(self, size: int) -> None:
        """The body has, or will have, so many bytes; ApiError 503 if they do not fit."""
        more = size - self._bytes
        if more <= 0:
            return
        if self._of.held + more > self._of.limit:
            raise self._of.full(more)
        self._of.held += more
        self._bytes = size

    def release(self) -> None:
        """The body is not held any more. May be called again."""
        self._of.held -= self._bytes
        self._bytes = 0
