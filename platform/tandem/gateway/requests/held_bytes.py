"""Byte budget of a gateway: bodies of requests that are being read, wait, or may have to be sent again.

A body counts as it comes, until an engine has answered with its first byte; then no retry needs it any more. Counted are bytes as
they came; what a parser makes of them is bounded by `api.bounded_json` and gone before the request waits.

One tenant holds half of the budget at most. Where a body does not fit, uploads that have stalled make room: a client that sends
most of a body and then nothing would else keep others out for as long as an upload may take.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable

from tandem.gateway.errors import ApiError

TENANT_SHARE = 0.5
"""Share of the budget that one tenant may hold; requests without a tenant may have all of it."""
STALLED_S = 1.0
"""Seconds without a byte after which an upload makes room for others."""


class HeldBytes:
    """The bytes that one gateway holds."""

    def __init__(self, limit: int, retry_after_s: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`limit`: the most that may be held (`gateway.max_held_bytes`)."""
        self.limit = limit
        self.held = 0
        self._retry_after_s = retry_after_s
        self._clock = clock
        self._by_tenant: Counter[str] = Counter()
        self._uploads: OrderedDict[HeldBody, float] = OrderedDict()
        """Bodies that are not whole, by the time of their last byte."""

    def body(self, tenant: str = "") -> HeldBody:
        """The share of a new body, of 0 bytes."""
        return HeldBody(self, tenant)

    def take(self, body: HeldBody, num_bytes: int) -> None:
        """Count more bytes of a body; ApiError 503 if they do not fit, and no stalled upload makes room."""
        now = self._clock()
        while not self._fits(body.tenant, num_bytes):
            stalled = self._stalled_upload(body, now)
            if stalled is None:
                raise self.full_error(num_bytes)
            stalled.evict()
        self.held += num_bytes
        self._by_tenant[body.tenant] += num_bytes
        if body in self._uploads:
            self._uploads[body] = now
            self._uploads.move_to_end(body)

    def give_back(self, body: HeldBody, size: int) -> None:
        """A body is not held any more."""
        self.held -= size
        self._by_tenant[body.tenant] -= size
        if self._by_tenant[body.tenant] <= 0:
            del self._by_tenant[body.tenant]
        self._uploads.pop(body, None)

    def upload_began(self, body: HeldBody) -> None:
        """A body is being read."""
        self._uploads[body] = self._clock()

    def upload_ended(self, body: HeldBody) -> None:
        """A body is whole."""
        self._uploads.pop(body, None)

    def full_error(self, size: int) -> ApiError:
        """503 for a body that does not fit: the gateway's state is the cause, not the client's rate."""
        return ApiError(
            503,
            f"The gateway holds {self.held:,} bytes of other requests, and {size:,} more would exceed {self.limit:,} "
            f"(gateway.max_held_bytes), or half of that for one tenant. Try again in {self._retry_after_s} s.",
            code="gateway_full",
            headers={"Retry-After": str(self._retry_after_s)},
        )

    def _fits(self, tenant: str, num_bytes: int) -> bool:
        if self.held + num_bytes > self.limit:
            return False
        return not tenant or self._by_tenant[tenant] + num_bytes <= TENANT_SHARE * self.limit

    def _stalled_upload(self, body: HeldBody, now: float) -> HeldBody | None:
        """The upload that has stalled for longest, of the same tenant if that holds its share."""
        share_is_full = self.held < self.limit and bool(body.tenant)
        for upload, last_byte_at in self._uploads.items():
            if now - last_byte_at < STALLED_S:
                return None
            if upload is not body and (not share_is_full or upload.tenant == body.tenant):
                return upload
        return None


class HeldBody:
    """The share of one body in the budget."""

    __slots__ = ("_budget", "_bytes", "_on_evict", "evicted", "tenant")

    def __init__(self, budget: HeldBytes, tenant: str) -> None:
        self.tenant = tenant
        self.evicted = False
        """Whether its upload had stalled and made room for others."""
        self._budget = budget
        self._bytes = 0
        self._on_evict: Callable[[], None] = lambda: None

    def begin(self, on_evict: Callable[[], None]) -> None:
        """The body is being read from now on; `on_evict` ends that."""
        self._on_evict = on_evict
        self._budget.upload_began(self)

    def end(self) -> None:
        """The body is whole."""
        self._budget.upload_ended(self)

    def grow_to(self, size: int) -> None:
        """The body has so many bytes; ApiError 503 if they do not fit."""
        if self.evicted:
            raise self._budget.full_error(size)
        if size > self._bytes:
            self._budget.take(self, size - self._bytes)
            self._bytes = size

    def evict(self) -> None:
        """Release the body's bytes for others, and end its upload."""
        self.evicted = True
        self.release()
        self._on_evict()

    def release(self) -> None:
        """The body is not held any more. May be called again."""
        self._budget.give_back(self, self._bytes)
        self._bytes = 0
