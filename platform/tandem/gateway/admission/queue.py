"""What one gateway does with the requests for one model: which start, which wait, which have waited long enough. Pure: callers
pass the clock (seconds that never go back).

While fewer than `limit` are in flight a request starts at once. Else it waits, behind those of its own priority and of better
ones, among `max_waiting` at most; one of a better priority takes the place of the last of the worst. Where no replica is ready
the limit is 0, and a request waits `hold_s` at most for one to come. What cannot be answered in its time is not started.
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
"""Share of the limit below which a request starts however little time it has: there nobody else has to bear it."""
MAX_WAITING_SHARE = 0.5
"""Share of its time that a request may wait. With more the short answers alone, which need the least of what is left, would get
all the room of a model that has too much to do."""


class Outcome(Enum):
    """What becomes of a request."""

    START = "start"
    WAIT = "wait"
    FULL = "full"
    """As many wait as may."""
    DISPLACED = "displaced"
    """It waited, and one of a better priority took its slot."""
    DEADLINE_UNREACHABLE = "hopeless"
    """It would wait for longer than it has time."""
    EXPIRED = "expired"
    """It has waited, and what is left of its time is too short for an answer."""
    UNSERVED = "unserved"
    """No replica became ready in time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulingHints:
    """What a request says of its own urgency."""

    arrived: float
    priority: int = 0
    """Lower is sooner."""
    start_by: float = math.inf
    """When nobody waits for its answer any more, unless that has begun."""
    finish_by: float = math.inf
    """When its answer must be whole."""
    kind: int = 0
    """Requests of one kind take about equally long."""

    def left_s(self, now: float) -> float:
        """How long its client says that it waits yet; 0 where it says nothing."""
        return max((by - now for by in (self.start_by, self.finish_by) if by < math.inf), default=0.0)


@dataclass(eq=False, slots=True)
class Ticket:
    """A request's slot."""

    hints: SchedulingHints
    started: float = 0.0


class Queue:
    """The requests of one model at one gateway."""

    def __init__(self, *, max_waiting: int, hold_s: float) -> None:
        self.max_waiting = max_waiting
        self.hold_s = hold_s
        self.limit: int | None = 0
        """Requests that may be in flight; None: any number."""
        self.running = 0
        """Those that have started and not ended."""
        self.throughput = ThroughputEstimator()
        self._waiting: dict[int, OrderedDict[Ticket, None]] = {}
        self._priorities: list[int] = []
        self._length = 0
        self._empty_since = -math.inf

    def __len__(self) -> int:
        """Requests that wait."""
        return self._length

    @property
    def has_capacity(self) -> bool:
        """Whether one more may start."""
        return self.limit is None or self.running < self.limit

    @property
    def _is_idle(self) -> bool:
        return self.limit is None or self.running < IDLE_SHARE * self.limit

    def set_limit(self, limit: int | None, now: float) -> None:
        """So many may be in flight from now on."""
        if limit and self.limit:
            self.throughput.scale(limit / self.limit)
        if limit == 0 and self.limit != 0:
            self._empty_since = now
        self.limit = limit

    def enter(self, ticket: Ticket, now: float) -> tuple[Outcome, Ticket | None]:
        """Take a new request: START, WAIT, or why neither; and the one that has to go for it, whose outcome is DISPLACED."""
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
        """Take back a request that has started and was taken by no replica: before those that came after it."""
        if self.has_capacity:
            return self._start(ticket, now)
        if self._is_late(ticket.hints, now):
            return Outcome.EXPIRED
        if self.limit == 0 and self._held_too_long(ticket, now):
            return Outcome.UNSERVED
        self._put(ticket, first=True)
        return Outcome.WAIT

    def leave(self, ticket: Ticket) -> None:
        """A request that waits is gone."""
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
        """A request that had started is over; `complete`: with all of its answer."""
        self.running -= 1
        self.throughput.ended(now, ticket.hints.kind, now - ticket.started, complete=complete)

    def start_cancelled(self) -> None:
        """A request that had started was taken by no replica: it is over, and of the pace it says nothing."""
        self.running -= 1

    def pop_startable(self, now: float) -> Iterator[tuple[Ticket, Outcome]]:
        """Those that may start now, and those that are found to be late when it is their turn. They wait no longer."""
        while self._length and self.has_capacity:
            ticket = next(iter(self._waiting[self._priorities[0]]))
            self.leave(ticket)
            yield ticket, Outcome.EXPIRED if self._is_late(ticket.hints, now) else self._start(ticket, now)

    def pop_overdue(self, now: float) -> list[tuple[Ticket, Outcome]]:
        """Those that have waited long enough, wherever they stand. They wait no longer."""
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
        """How long one more request of a priority would wait, as fast as answers end now; None: not known."""
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
        # Who has waited for room until now has only begun to wait for a replica.
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
