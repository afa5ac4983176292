"""Waiting requests of one queue, in the order in which they start. Pure.

The order, from the first rule that decides:

1. Aging: at every `AGED_EVERY`-th start the request that arrived first comes next, if it has waited for `AGED_S`. So each
   request starts at last, however many of better priorities come, and better priorities keep most of the capacity.
2. Priority: lower numbers first.
3. Tenants share the starts of one priority by start-time fair queueing (Goyal et al., 1996): each start moves its tenant's clock
   forward by the request's sequences, and the tenant whose clock is behind comes next. With equal requests that is round robin;
   a tenant that asks for 16 sequences each time has one start for 16 of a tenant that asks for one. Idle tenants save nothing up.
4. Arrival.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tandem.gateway.admission.queue import Ticket

AGED_S = 10.0
"""Seconds of waiting after which a request counts as aged."""
AGED_EVERY = 8
"""One start of so many is for the first of the aged requests."""


class WaitingRequests:
    """Tickets that wait, ordered by the rules of this module."""

    def __init__(self) -> None:
        self._buckets: dict[int, dict[str, OrderedDict[Ticket, None]]] = {}
        self._priorities: list[int] = []
        self._length = 0
        self._sequences: Counter[tuple[int, str]] = Counter()
        """Waiting sequences by priority and tenant."""
        self._num_by_tenant: Counter[str] = Counter()
        self._clocks: dict[str, float] = {}
        self._clock = 0.0
        """The clocks of all waiting tenants are at this or ahead."""
        self._num_starts = 0

    def __len__(self) -> int:
        return self._length

    def __contains__(self, ticket: Ticket) -> bool:
        hints = ticket.hints
        return ticket in self._buckets.get(hints.priority, {}).get(hints.tenant, ())

    def __iter__(self) -> Iterator[Ticket]:
        """All, in no particular order."""
        for tenants in self._buckets.values():
            for tickets in tenants.values():
                yield from tickets

    def put(self, ticket: Ticket, *, first: bool = False) -> None:
        """Add a request, behind those of its priority and tenant, or `first`."""
        priority, tenant = ticket.hints.priority, ticket.hints.tenant
        if priority not in self._buckets:
            self._buckets[priority] = {}
            insort(self._priorities, priority)
        tickets = self._buckets[priority].setdefault(tenant, OrderedDict())
        tickets[ticket] = None
        if first:
            tickets.move_to_end(ticket, last=False)
        self._length += 1
        self._num_by_tenant[tenant] += 1
        self._sequences[priority, tenant] += ticket.hints.sequences

    def remove(self, ticket: Ticket) -> bool:
        """Remove a request; False if it does not wait."""
        if ticket not in self:
            return False
        priority, tenant = ticket.hints.priority, ticket.hints.tenant
        tenants = self._buckets[priority]
        del tenants[tenant][ticket]
        if not tenants[tenant]:
            del tenants[tenant]
        if not tenants:
            del self._buckets[priority]
            self._priorities.remove(priority)
        self._length -= 1
        self._sequences[priority, tenant] -= ticket.hints.sequences
        if not self._sequences[priority, tenant]:
            del self._sequences[priority, tenant]
        self._num_by_tenant[tenant] -= 1
        if not self._num_by_tenant[tenant]:
            del self._num_by_tenant[tenant]
        return True

    def started(self, ticket: Ticket) -> None:
        """A request starts, from here or without having waited: its tenant's clock moves on."""
        hints = ticket.hints
        self._num_starts += 1
        if not self._length:
            # Clocks order waiting tenants only.
            self._clocks.clear()
            return
        self._clocks[hints.tenant] = self._clock_of(hints.tenant) + hints.sequences
        self._clock = max(self._clock, min(self._clock_of(waiting_tenant) for waiting_tenant in self._num_by_tenant))
        if len(self._clocks) > 2 * len(self._num_by_tenant) + 64:
            self._clocks = {key: clock for key, clock in self._clocks.items() if clock > self._clock}

    def in_order(self, now: float) -> Iterator[Ticket]:
        """All, in the order in which they start from now on."""
        if self._num_starts % AGED_EVERY == AGED_EVERY - 1:
            oldest = self._oldest()
            if oldest is not None and is_aged(oldest, now):
                yield oldest
        for priority in self._priorities:
            tenants = self._buckets[priority]
            for tenant in sorted(tenants, key=self._clock_of) if len(tenants) > 1 else tenants:
                yield from tenants[tenant]

    def sequences_ahead(self, priority: int, tenant: str, sequences: int) -> int:
        """Sequences that start before one more request of a priority and tenant: all of better priorities, and of each other
        tenant as many as are its share until then.
        """
        num_ahead = 0
        for (other_priority, other_tenant), waiting in self._sequences.items():
            if other_priority < priority or (other_priority == priority and other_tenant == tenant):
                num_ahead += waiting
            elif other_priority == priority:
                num_ahead += min(waiting, self._sequences[priority, tenant] + sequences)
        return num_ahead

    def displaceable(self, priority: int, tenant: str) -> Ticket | None:
        """The request that gives its place in a full queue to one of a priority and tenant; None: none does.

        It is of this tenant and of a worse priority, or of one that has more than one more waiting than this tenant and of no
        better priority: an urgent request takes no place of a tenant that has no more than its share. Of several it is the last
        of the worst priority, and there of the tenant that has the most.
        """
        num_own = self._num_by_tenant[tenant]
        for worst_priority in reversed(self._priorities):
            if worst_priority < priority:
                return None
            tenants = self._buckets[worst_priority]
            candidates = [
                other
                for other in tenants
                if self._num_by_tenant[other] > num_own + 1 or (other == tenant and worst_priority > priority)
            ]
            if candidates:
                longest = max(candidates, key=lambda other: self._num_by_tenant[other])
                return next(reversed(tenants[longest]))
        return None

    def _clock_of(self, tenant: str) -> float:
        return max(self._clock, self._clocks.get(tenant, 0.0))

    def _oldest(self) -> Ticket | None:
        heads = (next(iter(tickets)) for tenants in self._buckets.values() for tickets in tenants.values())
        return min(heads, key=lambda ticket: ticket.hints.arrived, default=None)


def is_aged(ticket: Ticket, now: float) -> bool:
    """Whether a request has waited for `AGED_S`."""
    return now - ticket.hints.arrived >= AGED_S
