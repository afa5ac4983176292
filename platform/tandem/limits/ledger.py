"""Ledger of limits: admits requests within the limits of their key and tenant, and settles what they have used.

A request reserves tokens when it is admitted, and is charged those that it has used when it has ended. Pure: callers pass the
moment. One ledger serves all gateways of an app; requests in flight at a gateway that is not heard of for `SILENT_S` count as
ended until it says that they are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from tandem.limits.records import (
    DAY_S,
    Admit,
    Answer,
    DayTotals,
    Exchange,
    Moment,
    Operation,
    Quota,
    Refusal,
    Reservation,
    Settle,
    Subject,
    Verdict,
)
from tandem.limits.window import SlidingWindow

SILENT_S = 10.0
"""Seconds after which a gateway's requests count as ended. Gateways call every second."""
UNREACHABLE_S = 3.0
"""After so many seconds without any call the ledger itself was paused or unreachable: no gateway counts as silent."""
RELEASED_S = 600.0
"""Seconds for which requests of a silent gateway are remembered: restored, they are not charged a second time."""
SWEEP_S = 60.0
"""Seconds between two removals of idle accounts."""
CONCURRENT_RETRY_S = 1.0
"""Retry-After where a limit of requests at once was met."""


@dataclass(slots=True)
class _Account:
    """Requests and tokens of one subject within its limits' windows."""

    requests: SlidingWindow = field(default_factory=SlidingWindow)
    tokens: SlidingWindow = field(default_factory=SlidingWindow)
    in_flight: int = 0
    reserved_tokens: int = 0
    """Of requests in flight."""
    day: int = 0
    day_tokens: int = 0
    """Used since midnight UTC of `day`, if the subject has a limit by the day."""

    def tokens_today(self, day: int) -> int:
        if day != self.day:
            self.day, self.day_tokens = day, 0
        return self.day_tokens

    def is_idle(self, now: Moment) -> bool:
        """Whether nothing counts against the limits, so that the account can be dropped."""
        total = self.requests.total(now.monotonic) or self.tokens.total(now.monotonic)
        return not (self.in_flight or total or self.tokens_today(now.day))


@dataclass(slots=True)
class _InFlight:
    reservation: Reservation
    gateway: str
    admitted_at: float


@dataclass(slots=True)
class _Gateway:
    heard_at: float
    number: int
    """Of its last exchange."""


class LimitLedger:
    """Accounts of all subjects with limits."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._in_flight: dict[str, _InFlight] = {}
        self._released: dict[str, tuple[float, _InFlight]] = {}
        """Requests of gateways that fell silent, with the time of that; oldest first."""
        self._gateways: dict[str, _Gateway] = {}
        self._contact_at: float | None = None
        self._swept_at = -math.inf

    def exchange(self, exchange: Exchange, now: Moment) -> Answer:
        """Apply an exchange of one of several gateways.

        A gateway that is new, or was silent, has to say first what is in flight there (`Answer.resend`).
        """
        self._end_silent(now)
        last_contact = self._gateways.get(exchange.gateway)
        if last_contact is None and exchange.reservations is None:
            return Answer(resend=True)
        if last_contact is not None and exchange.number <= last_contact.number:
            # Its answer would come too late: the gateway has decided by itself and sent what is in flight since.
            return Answer()
        self._gateways[exchange.gateway] = _Gateway(now.monotonic, exchange.number)
        if exchange.totals is not None:
            self.observe_day(exchange.totals, now)
        if exchange.reservations is not None:
            self._reconcile(exchange, exchange.reservations, now)
        return Answer(tuple(self.apply(exchange.gateway, exchange.operations, now)))

    def apply(self, gateway: str, operations: Iterable[Operation], now: Moment) -> list[Verdict]:
        """Apply a gateway's operations in their order; returns the verdict of each `Admit`."""
        self._evict_idle(now)
        verdicts = []
        for operation in operations:
            match operation:
                case Admit(reservation):
                    verdicts.append(self._admit(gateway, reservation, now))
                case Settle():
                    self._settle(operation, now)
        return verdicts

    def observe_day(self, totals: DayTotals, now: Moment) -> None:
        """Take over tokens of today that were read from the database: of requests before this ledger's start, and of those that
        ended without telling their tokens. It has no fewer than it knew of. Totals of another day change nothing.
        """
        if totals.day != now.day:
            return
        for subject, tokens in totals.tokens.items():
            account = self._account(subject)
            account.day_tokens = max(account.tokens_today(now.day), tokens)

    def in_flight(self, subject: str) -> int:
        """Requests of a subject in flight."""
        account = self._accounts.get(subject)
        return 0 if account is None else account.in_flight

    @property
    def subjects(self) -> frozenset[str]:
        """Subjects that have an account."""
        return frozenset(self._accounts)

    def _admit(self, gateway: str, reservation: Reservation, now: Moment) -> Verdict:
        for subject in reservation.subjects:
            refusal = self._refusal(subject, reservation.tokens, now)
            if refusal is not None:
                return self._verdict(reservation, refusal, now.monotonic)
        self._reserve(gateway, reservation, now.monotonic, counted=True)
        return self._verdict(reservation, None, now.monotonic)

    def _refusal(self, subject: Subject, tokens: int, moment: Moment) -> Refusal | None:
        account, limits, now = self._account(subject.id), subject.limits, moment.monotonic
        if (limit := limits.requests_per_minute) is not None:
            wait_s = account.requests.wait_s(1, limit, now)
            if wait_s:
                return Refusal("requests_per_minute", subject.id, limit, account.requests.total(now), wait_s)
        if (limit := limits.concurrent_requests) is not None and account.in_flight >= limit:
            retry_s = CONCURRENT_RETRY_S if limit else math.inf
            return Refusal("concurrent_requests", subject.id, limit, account.in_flight, retry_s)
        if (limit := limits.tokens_per_minute) is not None:
            wait_s = account.tokens.wait_s(tokens, limit, now)
            if wait_s:
                return Refusal("tokens_per_minute", subject.id, limit, account.tokens.total(now), wait_s)
        if (limit := limits.tokens_per_day) is not None:
            used = account.tokens_today(moment.day) + account.reserved_tokens
            if used + tokens > limit:
                retry_s = math.inf if tokens > limit else DAY_S - moment.wall % DAY_S
                return Refusal("tokens_per_day", subject.id, limit, used, retry_s)
        return None

    def _reserve(self, gateway: str, reservation: Reservation, now: float, *, counted: bool) -> None:
        """`counted`: whether it counts as a request of this minute; a restored one does not."""
        self._add_in_flight(_InFlight(reservation, gateway, now))
        for subject in reservation.subjects:
            account = self._account(subject.id)
            account.tokens.add(reservation.tokens, now)
            if counted:
                account.requests.add(1, now)

    def _add_in_flight(self, entry: _InFlight) -> None:
        self._in_flight[entry.reservation.id] = entry
        for subject in entry.reservation.subjects:
            account = self._account(subject.id)
            account.in_flight += 1
            account.reserved_tokens += entry.reservation.tokens

    def _release(self, entry: _InFlight) -> None:
        del self._in_flight[entry.reservation.id]
        for subject in entry.reservation.subjects:
            account = self._account(subject.id)
            account.in_flight -= 1
            account.reserved_tokens -= entry.reservation.tokens

    def _settle(self, settle: Settle, now: Moment) -> None:
        if (entry := self._in_flight.get(settle.id)) is not None:
            self._release(entry)
        elif settle.id in self._released:
            _, entry = self._released.pop(settle.id)
        else:
            return
        reserved_tokens = entry.reservation.tokens
        charged_tokens = max(reserved_tokens, settle.min_tokens) if settle.tokens is None else settle.tokens
        for subject in entry.reservation.subjects:
            account = self._account(subject.id)
            account.tokens.correct(charged_tokens - reserved_tokens, entry.admitted_at, now.monotonic)
            if settle.tokens is not None and subject.limits.tokens_per_day is not None:
                account.tokens_today(now.day)
                account.day_tokens += settle.tokens

    def _reconcile(self, exchange: Exchange, reservations: Iterable[Reservation], now: Moment) -> None:
        """Replace the gateway's requests in flight by `reservations`; the exchange's settlements are applied afterwards."""
        kept_ids = {item.id for item in reservations}
        kept_ids |= {item.id for item in exchange.operations if isinstance(item, Settle)}
        for id_, entry in list(self._in_flight.items()):
            if entry.gateway == exchange.gateway and id_ not in kept_ids:
                self._settle(Settle(id_, None), now)
        for reservation in reservations:
            if reservation.id in self._in_flight:
                continue
            if reservation.id in self._released:
                self._add_in_flight(self._released.pop(reservation.id)[1])
            else:
                self._reserve(exchange.gateway, reservation, now.monotonic, counted=False)

    def _end_silent(self, moment: Moment) -> None:
        now = moment.monotonic
        unreachable_s = 0.0 if self._contact_at is None else now - self._contact_at
        self._contact_at = now
        if unreachable_s > UNREACHABLE_S:
            for gateway in self._gateways.values():
                gateway.heard_at = min(now, gateway.heard_at + unreachable_s)
        silent_gateways = {name for name, gateway in self._gateways.items() if now - gateway.heard_at > SILENT_S}
        if silent_gateways:
            for name in silent_gateways:
                del self._gateways[name]
            for entry in [in_flight for in_flight in self._in_flight.values() if in_flight.gateway in silent_gateways]:
                self._release(entry)
                self._released[entry.reservation.id] = (now, entry)
        while self._released and now - next(iter(self._released.values()))[0] > RELEASED_S:
            del self._released[next(iter(self._released))]

    def _evict_idle(self, now: Moment) -> None:
        if now.monotonic - self._swept_at < SWEEP_S:
            return
        self._swept_at = now.monotonic
        for subject in [key for key, account in self._accounts.items() if account.is_idle(now)]:
            del self._accounts[subject]

    def _verdict(self, reservation: Reservation, refusal: Refusal | None, now: float) -> Verdict:
        requests: list[Quota] = []
        tokens: list[Quota] = []
        for subject, limits in reservation.subjects:
            account = self._account(subject)
            for quotas, limit, window in (
                (requests, limits.requests_per_minute, account.requests),
                (tokens, limits.tokens_per_minute, account.tokens),
            ):
                if limit is not None:
                    quotas.append(Quota(limit, max(0, limit - window.total(now)), window.empty_in_s(now)))
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
