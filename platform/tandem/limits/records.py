"""Records of the ledger of limits: operations of gateways, and the ledger's answers. Plain data."""

from __future__ import annotations

import time
from typing import NamedTuple, Self

from tandem.auth.principal import Limits

DAY_S = 86_400


class Moment(NamedTuple):
    """One moment by two clocks."""

    monotonic: float
    """Seconds of the monotonic clock, for windows and silence."""
    wall: float
    """Seconds since 1970: for the day alone."""

    @classmethod
    def now(cls) -> Self:
        """The present moment."""
        return cls(time.monotonic(), time.time())

    @property
    def day(self) -> int:
        """The day (UTC), counted from 1970."""
        return int(self.wall // DAY_S)


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
    maximum: int
    used: int
    """Amount that counts against the limit now."""
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
    """Operation: reserve a request's tokens, or refuse it."""

    reservation: Reservation


class Settle(NamedTuple):
    """Operation: a request has ended."""

    id: str
    tokens: int | None
    """Tokens that it has used; None: not known yet, counted later by the usage in the database."""
    min_tokens: int = 0
    """Where `tokens` are not known: those that it has used at least. The minute is charged the reservation or these, whichever
    is more.
    """


Operation = Admit | Settle


class DayTotals(NamedTuple):
    """Tokens of one day, as the database has them."""

    day: int
    """As `Moment.day` when they were read."""
    tokens: dict[str, int]
    """By subject."""


class Exchange(NamedTuple):
    """Message of a gateway to a shared ledger."""

    gateway: str
    number: int
    """Grows with each exchange of a gateway: one that arrives after a later one is ignored."""
    operations: tuple[Operation, ...]
    reservations: tuple[Reservation, ...] | None = None
    """All requests in flight at the gateway, without those that `operations` admit; None: as the ledger knows."""
    totals: DayTotals | None = None
    """None: as the ledger knows."""


class Answer(NamedTuple):
    """Answer of a shared ledger to an exchange."""

    verdicts: tuple[Verdict, ...] = ()
    """Of each `Admit`, in their order."""
    resend: bool = False
    """Nothing was applied: the ledger does not know what is in flight at the gateway, which has to send its `reservations`."""
