"""Ledger of limits: admits requests within the limits of their key and tenant, and settles what they have used.

A request reserves tokens when it is admitted, and is charged those that it has used when it has ended. Pure: callers pass a
clock, in seconds since 1970. One ledger serves all gateways of an app; requests in flight at a gateway that is not heard of for
`SILENT_S` count as ended.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from tandem.auth.principal import Limits
from tandem.limits.window import SlidingWindow

DAY_S = 86_400
SILENT_S = 10.0
"""Seconds after which a gateway's requests count as ended. Gateways call every second."""
CONCURRENT_RETRY_S = 1.0
"""Retry-After where a limit of requests at once was met."""


class Subject(NamedTuple):
    """A key (`key:ID`) or tenant (`tenant:NAME`) with its limits."""

    id: str
    limits: Limits


class Reservation(NamedTuple):
    """A request that wants to start."""

    id: str
    """Different for every request."""
    subjects: tuple[Subject, ...]
    tokens: int
    """Tokens that its prompt and its answer are expected to have at most."""


class Quota(NamedTuple):
    """The state of one limit, for response headers."""

    limit: int
    remaining: int
    reset_s: float
    """Seconds until all of it is free again if nothing more is used."""


class Refusal(NamedTuple):
    """The reason why a request may not start."""

    limit: str
    """Name of the limit, as in `auth.Limits`."""
    subject: str
    most: int
    used: int
    """What counts against it now."""
    retry_s: float
    """Seconds until it may start; infinity: never as it is."""


class Verdict(NamedTuple):
    """The answer to a reservation."""

    refusal: Refusal | None
    requests: Quota | None = None
    """The tightest limit of requests in a minute; None: there is none."""
    tokens: Quota | None = None
    """The tightest limit of tokens in a minute; None: there is none."""


class Admit(NamedTuple):
    """Operation: reserve what a request needs, or refuse it."""

    reservation: Reservation


class Settle(NamedTuple):
    """Operation: a request has ended; `tokens` that it has used, None: not known yet (the usage in the database will tell)."""

    id: str
    tokens: int | None


class Restore(NamedTuple):
    """Operation: a request that another ledger had admitted is in flight."""

    reservation: Reservation


Operation = Admit | Settle | Restore


@dataclass(slots=True)
class _Account:
    """What counts against the limits of one subject."""

    requests: SlidingWindow = field(default_factory=SlidingWindow)
    tokens: SlidingWindow = field(default_factory=SlidingWindow)
    in_flight: int = 0
    reserved_tokens: int = 0
    """Of requests in flight."""
    day: int = 0
    day_tokens: int = 0
    """Used since midnight UTC of `day`."""

    def tokens_today(self, now: float) -> int:
        day = int(now // DAY_S)
        if day != self.day:
            self.day, self.day_tokens = day, 0
        return self.day_tokens


@dataclass(slots=True)
class _InFlight:
    reservation: Reservation
    gateway: str
    at: float


class LimitLedger:
    """Accounts of all subjects with limits."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._in_flight: dict[str, _InFlight] = {}
        self._heard_at: dict[str, float] = {}

    def apply(self, gateway: str, operations: Iterable[Operation], now: float) -> list[Verdict]:
        """Apply a gateway's operations in their order; returns the verdict of each `Admit`."""
        self._heard_at[gateway] = now
        self._end_silent(now)
        verdicts = []
        for operation in operations:
            match operation:
                case Admit(reservation):
                    verdicts.append(self._admit(gateway, reservation, now))
                case Settle(id_, tokens):
                    self._settle(id_, tokens, now)
                case Restore(reservation):
                    if reservation.id not in self._in_flight:
                        self._reserve(gateway, reservation, now, counted=False)
        return verdicts

    def observe_day(self, totals: dict[str, int], now: float) -> None:
        """Take over tokens of today, by subject, that were read from the database: of requests before this ledger's start, and of
        those that ended without telling their tokens. It has no fewer than it knew of.
        """
        for subject, tokens in totals.items():
            account = self._account(subject)
            account.day_tokens = max(account.tokens_today(now), tokens)

    def in_flight(self, subject: str) -> int:
        """Requests of a subject in flight."""
        return self._account(subject).in_flight

    def _admit(self, gateway: str, reservation: Reservation, now: float) -> Verdict:
        for subject in reservation.subjects:
            refusal = self._refusal(subject, reservation.tokens, now)
            if refusal is not None:
                return self._verdict(reservation, refusal, now)
        self._reserve(gateway, reservation, now, counted=True)
        return self._verdict(reservation, None, now)

    def _refusal(self, subject: Subject, tokens: int, now: float) -> Refusal | None:
        account, limits = self._account(subject.id), subject.limits
        if (most := limits.requests_per_minute) is not None:
            wait_s = account.requests.wait_s(1, most, now)
            if wait_s:
                return Refusal("requests_per_minute", subject.id, most, account.requests.total(now), wait_s)
        if (most := limits.concurrent_requests) is not None and account.in_flight >= most:
            retry_s = CONCURRENT_RETRY_S if most else math.inf
            return Refusal("concurrent_requests", subject.id, most, account.in_flight, retry_s)
        if (most := limits.tokens_per_minute) is not None:
            wait_s = account.tokens.wait_s(tokens, most, now)
            if wait_s:
                return Refusal("tokens_per_minute", subject.id, most, account.tokens.total(now), wait_s)
        if (most := limits.tokens_per_day) is not None:
            used = account.tokens_today(now) + account.reserved_tokens
            if used + tokens > most:
                retry_s = math.inf if tokens > most else DAY_S - now % DAY_S
                return Refusal("tokens_per_day", subject.id, most, used, retry_s)
        return None

    def _reserve(self, gateway: str, reservation: Reservation, now: float, *, counted: bool) -> None:
        """`counted`: whether it counts as a request of this minute; a restored one does not."""
        self._in_flight[reservation.id] = _InFlight(reservation, gateway, now)
        for subject in reservation.subjects:
            account = self._account(subject.id)
            account.in_flight += 1
            account.reserved_tokens += reservation.tokens
            account.tokens.add(reservation.tokens, now)
            if counted:
                account.requests.add(1, now)

    def _settle(self, id_: str, tokens: int | None, now: float) -> None:
        entry = self._in_flight.pop(id_, None)
        if entry is None:
            return
        reserved = entry.reservation.tokens
        for subject in entry.reservation.subjects:
            account = self._account(subject.id)
            account.in_flight -= 1
            account.reserved_tokens -= reserved
            if tokens is not None:
                account.tokens.correct(tokens - reserved, entry.at, now)
                account.tokens_today(now)
                account.day_tokens += tokens

    def _end_silent(self, now: float) -> None:
        silent = [gateway for gateway, at in self._heard_at.items() if now - at > SILENT_S]
        for gateway in silent:
            del self._heard_at[gateway]
            for id_ in [id_ for id_, entry in self._in_flight.items() if entry.gateway == gateway]:
                self._settle(id_, None, now)

    def _verdict(self, reservation: Reservation, refusal: Refusal | None, now: float) -> Verdict:
        requests: list[Quota] = []
        tokens: list[Quota] = []
        for subject, limits in reservation.subjects:
            account = self._account(subject)
            for quotas, most, window in (
                (requests, limits.requests_per_minute, account.requests),
                (tokens, limits.tokens_per_minute, account.tokens),
            ):
                if most is not None:
                    quotas.append(Quota(most, max(0, most - window.total(now)), window.empty_in_s(now)))
        return Verdict(
            refusal,
            min(requests, key=lambda quota: quota.remaining, default=None),
            min(tokens, key=lambda quota: quota.remaining, default=None),
        )

    def _account(self, subject: str) -> _Account:
        account = self._accounts.get(subject)
        if account is None:
            account = self._accounts[subject] = _Account()
        return account
