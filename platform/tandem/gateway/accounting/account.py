"""Account of one request: its place within the limits of its key and tenant, and the tokens that it has used."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from tandem.api.fan_out import to_integer
from tandem.auth.principal import Limits, Principal
from tandem.engine.routes import GENERATE, EngineRoute
from tandem.engine.usage import TokenCounts
from tandem.gateway.accounting.limiter import Limiter
from tandem.gateway.errors import ApiError
from tandem.limits import Refusal, Reservation, Subject
from tandem.limits.records import Quota
from tandem.usage import UsageCounts, UsageLabels, UsageWriter
from tandem.usage.wire import COUNTS_HEADER, StreamCounts, counts_from_header

BYTES_PER_TOKEN = 4
"""Bytes of a request for each token that is reserved for its prompt."""
ANSWER_TOKENS = 256
"""Tokens that are reserved for an answer without a limit of its own."""
MAX_TOKENS_FIELDS = {
    "/v1/completions": ("max_tokens",),
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
}
"""Fields with the length of an answer, by route; the first that a request has is the one that counts."""
MAX_REMEMBERED = 10_000
"""Refusals that are remembered before those that have passed are forgotten."""
MAX_MEMORY_S = 5.0
"""Seconds for which a refusal is repeated without asking the ledger: a limit that was raised holds after that."""
LIMIT_DESCRIPTIONS = {
    "requests_per_minute": "requests in a minute",
    "tokens_per_minute": "tokens in a minute",
    "concurrent_requests": "requests at once",
    "tokens_per_day": "tokens in a day (UTC)",
}

DEFAULT_PRIORITY = 0
"""The priority of requests that have none, and the most urgent one unless a limit allows more."""
TenantLimits = Callable[[str], Limits]
"""The limits of a tenant."""


class Accounting:
    """Limits and usage of all requests at one gateway."""

    def __init__(self, limiter: Limiter, usage: UsageWriter, tenant_limits: TenantLimits) -> None:
        self.limiter = limiter
        self.usage = usage
        self._tenant_limits = tenant_limits
        self._prefix = uuid.uuid4().hex
        self._counter = itertools.count()
        self._recent_refusals: dict[str, tuple[float, Refusal]] = {}
        """Keys and tenants that have used all requests of their minute, with the monotonic time until which that is cached."""

    def new_reservation_id(self) -> str:
        """An id that no other reservation at any gateway has."""
        return f"{self._prefix}-{next(self._counter)}"

    async def start(self) -> None:
        """Start the limiter and the writer."""
        self.usage.start()
        await self.limiter.start()

    async def stop(self) -> None:
        """Write all usage."""
        await self.limiter.stop()
        await self.usage.stop()

    def subjects(self, principal: Principal) -> tuple[Subject, ...]:
        """The key and the tenant of a request, as far as they have limits."""
        pairs = (
            (f"key:{principal.counted_as}", principal.limits),
            (f"tenant:{principal.tenant}", self._tenant_limits(principal.tenant)),
        )
        return tuple(Subject(id_, limits) for id_, limits in pairs if limits.counts_anything)

    def check_rate(self, principal: Principal) -> None:
        """ApiError 429, before the body is read, for a key or tenant that has used all requests of its minute."""
        for subject in self.subjects(principal) if self._recent_refusals else ():
            expires_at, refusal = self._recent_refusals.get(subject.id, (0.0, None))
            if refusal is not None and (remaining_s := expires_at - time.monotonic()) > 0:
                is_final = refusal.retry_s == math.inf
                raise refusal_error(refusal if is_final else refusal._replace(retry_s=remaining_s), {}, 0)

    async def count(self, principal: Principal) -> None:
        """Count a request that is refused before it is relayed; ApiError 429 if that exceeds a limit."""
        account = RequestAccount(self, self.subjects(principal), UsageLabels("", "", "", "", ""), TokenCounts(0, 0))
        await account.acquire()
        account.close(reached_engine=False)

    @contextlib.asynccontextmanager
    async def counted(self, principal: Principal, route: str) -> AsyncIterator[None]:
        """A request that no engine answers: it counts for limits and usage, without tokens; ApiError 429."""
        self.check_rate(principal)
        labels = UsageLabels(principal.key_id, principal.tenant, "", "", route)
        account = self.open(principal, labels, TokenCounts(0, 0))
        await account.acquire()
        try:
            yield
        finally:
            account.close(reached_engine=False)
            self.usage.add(labels, UsageCounts(requests=1))

    def remember(self, refusal: Refusal) -> None:
        """Cache the refusal of a key or tenant that has used all requests of its minute."""
        now = time.monotonic()
        if len(self._recent_refusals) >= MAX_REMEMBERED:
            self._recent_refusals = {name: entry for name, entry in self._recent_refusals.items() if entry[0] > now}
        self._recent_refusals[refusal.subject] = (now + min(refusal.retry_s, MAX_MEMORY_S), refusal)

    def highest_priority(self, principal: Principal) -> int | None:
        """The most urgent priority that a request may have; None: any.

        The stricter one of the key's and the tenant's, and DEFAULT_PRIORITY where neither has one: else each tenant could put its
        requests before those of all others. Requests without a tenant have nobody to overtake but each other.
        """
        if not principal.tenant:
            return None
        limits = (principal.limits, self._tenant_limits(principal.tenant))
        priorities = [limit.highest_priority for limit in limits if limit.highest_priority is not None]
        return max(priorities, default=DEFAULT_PRIORITY)

    def open(self, principal: Principal, labels: UsageLabels, expected_counts: TokenCounts) -> RequestAccount:
        """The account of one request; `expected_counts`: tokens that are reserved for it."""
        return RequestAccount(self, self.subjects(principal), labels, expected_counts)


class RequestAccount:
    """One request: `acquire`, then the parts of its answer, then `close`."""

    def __init__(
        self, accounting: Accounting, subjects: tuple[Subject, ...], labels: UsageLabels, expected_counts: TokenCounts
    ) -> None:
        self.labels = labels
        self.headers: dict[str, str] = {}
        """Response headers with the state of the limits; empty: there are none."""
        self.counts: TokenCounts | None = None
        """Tokens as the engine counted them; None: not reported yet."""
        self._accounting = accounting
        self._subjects = subjects
        self._expected_counts = expected_counts
        self._reservation_id: str | None = None
        self._stream = StreamCounts()
        self._num_events = 0

    async def acquire(self) -> None:
        """Reserve the request's tokens; ApiError 429 where a limit is met."""
        if not self._subjects:
            return
        reservation = Reservation(self._accounting.new_reservation_id(), self._subjects, sum(self._expected_counts))
        verdict = await self._accounting.limiter.admit(reservation)
        self.headers = quota_headers(verdict.requests, verdict.tokens, anthropic="/messages" in self.labels.route)
        if verdict.refusal is not None:
            if verdict.refusal.limit == "requests_per_minute":
                self._accounting.remember(verdict.refusal)
            raise refusal_error(verdict.refusal, self.headers, sum(self._expected_counts))
        self._reservation_id = reservation.id

    def read_head(self, headers: Mapping[str, str]) -> None:
        """Read the counts in the head of an answer."""
        self.counts = counts_from_header(headers.get(COUNTS_HEADER))

    def read_chunk(self, chunk: bytes) -> bytes:
        """A chunk of a stream as the client gets it, without the counts."""
        chunk = self._stream.without_comment(chunk)
        self.counts = self._stream.counts
        self._num_events += chunk.count(b"\n\n")
        return chunk

    def engine_lost(self) -> None:
        """The engine was killed before it reported its counts: the request is charged the events that have arrived."""
        if self.counts is None:
            self.counts = TokenCounts(self._expected_counts.prompt, self._num_events)
            self._accounting.usage.add(self.labels, UsageCounts(1, *self.counts, 1))

    def close(self, *, reached_engine: bool) -> None:
        """The request has ended. `reached_engine`: whether an engine may have worked on it; else it is charged no tokens.

        Of an answer that broke off or was left, at least the reservation and what has arrived of it are charged to the minute.
        """
        if self._reservation_id is None:
            return
        if self.counts is not None:
            self._accounting.limiter.settle(self._reservation_id, sum(self.counts))
        elif reached_engine:
            self._accounting.limiter.settle(self._reservation_id, None, self._expected_counts.prompt + self._num_events)
        else:
            self._accounting.limiter.settle(self._reservation_id, 0)
        self._reservation_id = None


def refusal_error(refusal: Refusal, quota: Mapping[str, str], reserved_tokens: int) -> ApiError:
    """429 for a limit that was met; `quota`: headers with its state, `reserved_tokens`: tokens that the request reserves."""
    kind, _, name = refusal.subject.partition(":")
    reason = f"The {kind} {name} may have {refusal.maximum} {LIMIT_DESCRIPTIONS[refusal.limit]} and has {refusal.used}"
    headers = dict(quota)
    if "tokens" in refusal.limit:
        reason += (
            f"; this request reserves {reserved_tokens}: its prompt by its size, and for each answer max_tokens or, without, "
            f"{ANSWER_TOKENS}"
        )
    if refusal.retry_s == math.inf:
        headers["x-should-retry"] = "false"
        advice = "Ask for less." if refusal.maximum else "Ask whoever manages keys for more."
    else:
        seconds = max(1, math.ceil(refusal.retry_s))
        headers["Retry-After"] = str(seconds)
        if refusal.limit == "tokens_per_day":
            headers["x-should-retry"] = "false"
        advice = f"Try again in {seconds} s."
    code = "insufficient_quota" if refusal.limit == "tokens_per_day" else "rate_limit_exceeded"
    return ApiError(429, f"{reason}. {advice}", code=code, headers=headers)


def expected_tokens(
    route: EngineRoute, body: Mapping[str, Any], size: int, sequences: int, max_length: int | None
) -> TokenCounts:
    """Tokens to reserve for a request of `size` bytes that starts so many sequences: its prompts by their size, its answers by
    their limit.
    """
    prompt_tokens = size // BYTES_PER_TOKEN
    max_tokens = next((body[key] for key in MAX_TOKENS_FIELDS.get(route.path, ()) if body.get(key) is not None), None)
    # An engine takes a number that is given as text too.
    answer_tokens = (
        max(ANSWER_TOKENS, to_integer(body.get("min_tokens"))) if max_tokens is None else to_integer(max_tokens)
    )
    if max_length is not None:
        prompt_tokens, answer_tokens = min(prompt_tokens, max_length * sequences), min(answer_tokens, max_length)
    if route.task != GENERATE or route.light:
        return TokenCounts(prompt_tokens, 0)
    return TokenCounts(prompt_tokens, max(0, answer_tokens) * sequences)


def quota_headers(requests: Quota | None, tokens: Quota | None, *, anthropic: bool) -> dict[str, str]:
    """Headers with the state of limits that OpenAI's SDK reads, or Anthropic's."""
    headers: dict[str, str] = {}
    for kind, quota in (("requests", requests), ("tokens", tokens)):
        if quota is None:
            continue
        if anthropic:
            reset = datetime.now(UTC) + timedelta(seconds=math.ceil(quota.reset_s))
            values = {"limit": quota.limit, "remaining": quota.remaining, "reset": f"{reset:%Y-%m-%dT%H:%M:%SZ}"}
            headers |= {f"anthropic-ratelimit-{kind}-{name}": str(value) for name, value in values.items()}
        else:
            values = {"limit": quota.limit, "remaining": quota.remaining, "reset": f"{quota.reset_s:.3f}s"}
            headers |= {f"x-ratelimit-{name}-{kind}": str(value) for name, value in values.items()}
    return headers
