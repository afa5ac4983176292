"""Priority queue with deadlines for the requests of one model at one gateway. Pure: callers pass a monotonic clock, in seconds.

While fewer than `limit` requests are in flight, a request starts at once. Otherwise it waits behind requests of its own and
better priorities, among at most `max_waiting`; in a full queue a request of a better priority displaces the last one of the
worst. While no replica is ready the limit is 0, and a request waits at most `hold_s`. Requests that would miss their deadline
are not started.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from tandem.gateway.admission.throughput import ThroughputEstimator

IDLE_SHARE = 0.5
"""Share of the limit below which a request starts whatever its deadline: it delays no other request."""
MAX_WAITING_SHARE = 0.5
"""Largest share of its remaining time that a request may wait. With more, short answers alone, which need the least time, would
get all capacity of an overloaded model."""


class Outcome(Enum):
    """Decision about a request. The values are metric labels."""

    START = "start"
    WAIT = "wait"
    FULL = "full"
    """The queue is full."""
    DISPLACED = "displaced"
    """A request of a better priority took its place in a full queue."""
    DEADLINE_UNREACHABLE = "hopeless"
    """It would wait for longer than its deadline allows."""
    EXPIRED = "expired"
    """It has waited, and its remaining time is too short for an answer."""
    UNSERVED = "unserved"
    """No replica became ready in time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulingHints:
    """Priority, deadlines and expected length of a request."""

    arrived: float
    priority: int = 0
    """Lower starts sooner."""
    start_by: float = math.inf
    """Time by which the answer must have begun."""
    finish_by: float = math.inf
    """Time by which the answer must be complete."""
    kind: int = 0
    """Class of answer lengths: requests of one kind take about equally long."""

    def left_s(self, now: float) -> float:
        """Seconds until the later of its deadlines; 0 without deadlines."""
        return max((by - now for by in (self.start_by, self.finish_by) if by < math.inf), default=0.0)


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
        """Requests that may be in flight; None: no limit."""
        self.running = 0
        """Requests that have started and not ended."""
        self.throughput = ThroughputEstimator()
        self._waiting: dict[int, OrderedDict[Ticket, None]] = {}
        self._priorities: list[int] = []
        self._length = 0
        self._empty_since = -math.inf

    def __len__(self) -> int:
        """Number of waiting requests."""
        return self._length

    @property
    def has_capacity(self) -> bool:
        """Whether one more may start."""
        return self.limit is None or self.running < self.limit

    @property
    def _is_idle(self) -> bool:
        return self.limit is None or self.running < IDLE_SHARE * self.limit

    def set_limit(self, limit: int | None, now: float) -> None:
        """Change the number of requests that may be in flight."""
        if limit and self.limit:
            self.throughput.scale(limit / self.limit)
        if limit == 0 and self.limit != 0:
            self._empty_since = now
        self.limit = limit

    def enter(self, ticket: Ticket, now: float) -> tuple[Outcome, Ticket | None]:
        """Decide about a new request: START, WAIT or a reason for neither; and the ticket that it displaces, if any."""
        hints = ticket.hints
        if not self._length and self.has_capacity and (self._is_idle or not self._is_late(hints, now)):
            return self._start(ticket, now), None
        if self.limit == 0 and self.hold_s <= 0:
            return Outcome.UNSERVED, None
        if self._is_late(hints, now):
            return Outcome.EXPIRED, None
        estimated_wait_s = self.estimated_wait_s(hints.priority) or 0.0
        patience_s = min(hints.start_by, hints.finish_by) - now
        if estimated_wait_s >= MAX_WAITING_SHARE * patience_s or self._is_late(hints, now + estimated_wait_s):
            return Outcome.DEADLINE_UNREACHABLE, None
        displaced = None
        if self._length >= self.max_waiting:
            displaced = self._worst()
            if displaced is None or displaced.hints.priority <= hints.priority:
                return Outcome.FULL, None
            self.leave(displaced)
        self._put(ticket)
        self.throughput.waiting_began(now)
        return Outcome.WAIT, displaced

    def reenter(self, ticket: Ticket, now: float) -> Outcome:
        """Queue a request again that no replica took, before those that arrived after it."""
        if self.has_capacity:
            return self._start(ticket, now)
        if self._is_late(ticket.hints, now):
            return Outcome.EXPIRED
        if self.limit == 0 and self._held_too_long(ticket, now):
            return Outcome.UNSERVED
        self._put(ticket, first=True)
        return Outcome.WAIT

    def leave(self, ticket: Ticket) -> None:
        """Remove a waiting request; nothing happens if it does not wait."""
        priority = ticket.hints.priority
        bucket = self._waiting.get(priority)
        if bucket is None or ticket not in bucket:
            return
        del bucket[ticket]
        self._length -= 1
        if not bucket:
            del self._waiting[priority]
            self._priorities.remove(priority)
        if not self._length:
            self.throughput.waiting_ended()

    def ended(self, ticket: Ticket, now: float, *, complete: bool) -> None:
        """A started request has ended; `complete`: its whole answer was sent."""
        self.running -= 1
        self.throughput.ended(now, ticket.hints.kind, now - ticket.started, complete=complete)

    def start_cancelled(self) -> None:
        """A started request was taken by no replica: it counts neither as running nor for the throughput."""
        self.running -= 1

    def pop_startable(self, now: float) -> Iterator[tuple[Ticket, Outcome]]:
        """Remove and return waiting requests that may start now, and those that are too late when it is their turn."""
        while self._length and self.has_capacity:
            ticket = next(iter(self._waiting[self._priorities[0]]))
            self.leave(ticket)
            yield ticket, Outcome.EXPIRED if self._is_late(ticket.hints, now) else self._start(ticket, now)

    def pop_overdue(self, now: float) -> list[tuple[Ticket, Outcome]]:
        """Remove and return waiting requests whose deadline or `hold_s` has passed."""
        found: list[tuple[Ticket, Outcome]] = []
        for bucket in self._waiting.values():
            for ticket in bucket:
                if self._is_late(ticket.hints, now):
                    found.append((ticket, Outcome.EXPIRED))
                elif self.limit == 0 and self._held_too_long(ticket, now):
                    found.append((ticket, Outcome.UNSERVED))
        for ticket, _ in found:
            self.leave(ticket)
        return found

    def estimated_wait_s(self, priority: int) -> float | None:
        """Seconds that a new request of a priority would wait at the current throughput; None: not known."""
        if not self.throughput.rate or not self.limit:
            return None
        ahead = sum(len(self._waiting[each]) for each in self._priorities if each <= priority)
        return (ahead + 1) / self.throughput.rate

    def _start(self, ticket: Ticket, now: float) -> Outcome:
        self.running += 1
        ticket.started = now
        return Outcome.START

    def _is_late(self, hints: SchedulingHints, now: float) -> bool:
        return now >= hints.start_by or now + self.throughput.answer_time_s(hints.kind) >= hints.finish_by

    def _held_too_long(self, ticket: Ticket, now: float) -> bool:
        # Time spent waiting for capacity does not count: waiting for a replica began when the last one went.
        return now - max(ticket.hints.arrived, self._empty_since) >= self.hold_s

    def _put(self, ticket: Ticket, *, first: bool = False) -> None:
        priority = ticket.hints.priority
        bucket = self._waiting.get(priority)
        if bucket is None:
            bucket = self._waiting[priority] = OrderedDict()
            insort(self._priorities, priority)
        bucket[ticket] = None
        if first:
            bucket.move_to_end(ticket, last=False)
        self._length += 1

    def _worst(self) -> Ticket | None:
        return next(reversed(self._waiting[self._priorities[-1]])) if self._priorities else None
