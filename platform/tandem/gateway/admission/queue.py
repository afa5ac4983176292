"""Priority queue with deadlines for the requests of one model at one gateway. Pure: callers pass a monotonic clock, in seconds.

A request takes a slot for each sequence that it starts. It starts at once if nobody waits and `limit` slots are not exceeded, or
if it is wider than that and the model is idle. Otherwise it waits, among at most `max_waiting` requests, in the order of
`waiting`; in a full queue a request of a better priority displaces the last one of the worst, and one of a tenant with few
waiting requests the last one of the tenant with the most. A request that is too wide for the free slots is passed by narrower
ones until it has waited for `waiting.AGED_S`; from then on slots that come free are kept for it. While no replica is ready the
limit is 0, and a request waits at most `hold_s`. Requests that would miss their deadline are not started.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import islice

from tandem.gateway.admission.throughput import ThroughputEstimator
from tandem.gateway.admission.waiting import WaitingRequests, is_aged

IDLE_SHARE = 0.5
"""Share of the limit below which a request starts whatever its deadline: it delays no other request."""
MAX_WAITING_SHARE = 0.5
"""Largest share of its remaining time that a request may wait. With more, short answers alone, which need the least time, would
get all capacity of an overloaded model."""
MAX_SCANNED = 256
"""Waiting requests among which one that fits into the free slots is looked for."""


class Outcome(Enum):
    """Decision about a request. The values are metric labels."""

    START = "start"
    WAIT = "wait"
    FULL = "full"
    """The queue is full."""
    DISPLACED = "displaced"
    """A request of a better priority, or of a tenant with fewer waiting requests, took its place in a full queue."""
    DEADLINE_UNREACHABLE = "deadline_unreachable"
    """It would wait for longer than its deadline allows."""
    EXPIRED = "expired"
    """It has waited, and its remaining time is too short for an answer."""
    UNSERVED = "unserved"
    """No replica became ready in time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulingHints:
    """Priority, deadlines, width and expected length of a request, and the tenant that it is for."""

    arrived: float
    priority: int = 0
    """Lower starts sooner."""
    start_by: float = math.inf
    """Time by which the answer must have begun."""
    finish_by: float = math.inf
    """Time by which the answer must be complete."""
    kind: int = 0
    """Class of answer lengths: requests of one kind take about equally long."""
    sequences: int = 1
    """Sequences that it starts in the engine (`api.fan_out`)."""
    tenant: str = ""
    """Tenants share the slots of requests of equal priority."""

    def left_s(self, now: float) -> float:
        """Seconds until the later of its deadlines; 0 without deadlines."""
        return max((deadline - now for deadline in (self.start_by, self.finish_by) if deadline < math.inf), default=0.0)


@dataclass(eq=False, slots=True)
class Ticket:
    """A request in a queue; compared by identity."""

    hints: SchedulingHints
    started: float = 0.0


class Queue:
    """The requests of one model at one gateway."""

    def __init__(self, *, max_waiting: int, hold_s: float) -> None:
        self.max_waiting = max_waiting
        self.hold_s = hold_s
        self.limit: int | None = 0
        """Sequences that may be in flight; None: no limit."""
        self.running = 0
        """Requests that have started and not ended."""
        self.sequences = 0
        """Their sequences."""
        self.throughput = ThroughputEstimator()
        self._waiting = WaitingRequests()
        self._empty_since = -math.inf

    def __len__(self) -> int:
        """Number of waiting requests."""
        return len(self._waiting)

    @property
    def has_capacity(self) -> bool:
        """Whether one more sequence may start."""
        return self.limit is None or self.sequences < self.limit

    @property
    def _is_idle(self) -> bool:
        return self.limit is None or self.sequences < IDLE_SHARE * self.limit

    def set_limit(self, limit: int | None, now: float) -> None:
        """Change the number of sequences that may be in flight."""
        if limit and self.limit:
            self.throughput.scale(limit / self.limit)
        if limit == 0 and self.limit != 0:
            self._empty_since = now
        self.limit = limit

    def enter(self, ticket: Ticket, now: float) -> tuple[Outcome, Ticket | None]:
        """Decide about a new request: START, WAIT or a reason for neither; and the ticket that it displaces, if any."""
        hints = ticket.hints
        if not self._waiting and self._fits(hints) and (self._is_idle or not self._is_late(hints, now)):
            return self._start(ticket, now), None
        if self.limit == 0 and self.hold_s <= 0:
            return Outcome.UNSERVED, None
        if self._is_late(hints, now):
            return Outcome.EXPIRED, None
        estimated_wait_s = self.estimated_wait_s(hints) or 0.0
        patience_s = min(hints.start_by, hints.finish_by) - now
        if estimated_wait_s >= MAX_WAITING_SHARE * patience_s or self._is_late(hints, now + estimated_wait_s):
            return Outcome.DEADLINE_UNREACHABLE, None
        displaced = None
        if len(self) >= self.max_waiting:
            displaced = self._waiting.displaceable(hints.priority, hints.tenant)
            if displaced is None:
                return Outcome.FULL, None
            self.leave(displaced)
        self._waiting.put(ticket)
        if self._next(now) is ticket:
            # All others that wait are too wide for the free slots.
            self.leave(ticket)
            return self._start(ticket, now), displaced
        self.throughput.waiting_began(now)
        return Outcome.WAIT, displaced

    def reenter(self, ticket: Ticket, now: float) -> Outcome:
        """Queue a request again that no replica took, before those that arrived after it."""
        if self._fits(ticket.hints):
            return self._start(ticket, now)
        if self._is_late(ticket.hints, now):
            return Outcome.EXPIRED
        if self.limit == 0 and self._exceeds_hold(ticket, now):
            return Outcome.UNSERVED
        self._waiting.put(ticket, first=True)
        return Outcome.WAIT

    def leave(self, ticket: Ticket) -> None:
        """Remove a waiting request; nothing happens if it does not wait."""
        if self._waiting.remove(ticket) and not self._waiting:
            self.throughput.waiting_ended()

    def ended(self, ticket: Ticket, now: float, *, complete: bool) -> None:
        """A started request has ended; `complete`: its whole answer was sent."""
        self._release(ticket)
        self.throughput.ended(
            now, ticket.hints.kind, now - ticket.started, complete=complete, sequences=ticket.hints.sequences
        )

    def start_cancelled(self, ticket: Ticket) -> None:
        """A started request was taken by no replica: it counts neither as running nor for the throughput."""
        self._release(ticket)

    def pop_startable(self, now: float) -> Iterator[tuple[Ticket, Outcome]]:
        """Remove and return waiting requests that may start now, and those that are too late when it is their turn."""
        while self.has_capacity and (ticket := self._next(now)) is not None:
            self.leave(ticket)
            yield ticket, Outcome.EXPIRED if self._is_late(ticket.hints, now) else self._start(ticket, now)

    def pop_overdue(self, now: float) -> list[tuple[Ticket, Outcome]]:
        """Remove and return waiting requests whose deadline or `hold_s` has passed."""
        overdue: list[tuple[Ticket, Outcome]] = []
        for ticket in self._waiting:
            if self._is_late(ticket.hints, now):
                overdue.append((ticket, Outcome.EXPIRED))
            elif self.limit == 0 and self._exceeds_hold(ticket, now):
                overdue.append((ticket, Outcome.UNSERVED))
        for ticket, _ in overdue:
            self.leave(ticket)
        return overdue

    def estimated_wait_s(self, hints: SchedulingHints) -> float | None:
        """Seconds that a new request would wait at the current throughput; None: not known."""
        if not self.throughput.rate or not self.limit:
            return None
        sequences_ahead = self._waiting.sequences_ahead(hints.priority, hints.tenant, hints.sequences)
        return (sequences_ahead + hints.sequences) / self.throughput.rate

    def _next(self, now: float) -> Ticket | None:
        """The waiting request that starts next, or is found to be late; None: none may start now."""
        for ticket in islice(self._waiting.in_order(now), MAX_SCANNED):
            if self._fits(ticket.hints) or self._is_late(ticket.hints, now):
                return ticket
            if is_aged(ticket, now):
                return None
        return None

    def _fits(self, hints: SchedulingHints) -> bool:
        if self.limit is None or self.sequences + hints.sequences <= self.limit:
            return True
        return self.sequences == 0 and self.limit > 0

    def _start(self, ticket: Ticket, now: float) -> Outcome:
        self.running += 1
        self.sequences += ticket.hints.sequences
        ticket.started = now
        self._waiting.started(ticket)
        return Outcome.START

    def _release(self, ticket: Ticket) -> None:
        self.running -= 1
        self.sequences -= ticket.hints.sequences

    def _is_late(self, hints: SchedulingHints, now: float) -> bool:
        return now >= hints.start_by or now + self.throughput.answer_time_s(hints.kind) >= hints.finish_by

    def _exceeds_hold(self, ticket: Ticket, now: float) -> bool:
        # Time spent waiting for capacity does not count: waiting for a replica began when the last one went.
        return now - max(ticket.hints.arrived, self._empty_since) >= self.hold_s
