"""Shares of the admission queue: wide requests, tenants, aging."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.gateway.admission.queue import Outcome, Queue, SchedulingHints, Ticket
from tandem.gateway.admission.waiting import AGED_EVERY, AGED_S


def queue(limit: int = 1, most: int = 1000) -> Queue:
    made = Queue(max_waiting=most, hold_s=30.0)
    made.set_limit(limit, 0.0)
    return made


def ask(tenant: str = "", at: float = 0.0, *, sequences: int = 1, priority: int = 0, finish_by: float = 1e9) -> Ticket:
    hints = SchedulingHints(
        arrived=at, tenant=tenant, sequences=sequences, priority=priority, start_by=1e9, finish_by=finish_by
    )
    return Ticket(hints)


def enter(q: Queue, ticket: Ticket, now: float = 0.0) -> Outcome:
    return q.enter(ticket, now)[0]


def started(q: Queue, now: float = 0.0) -> list[Ticket]:
    return [ticket for ticket, outcome in q.pop_startable(now) if outcome is Outcome.START]


def order(q: Queue, running: Ticket, count: int) -> list[Ticket]:
    """The next tickets that start, one at a time."""
    found = []
    for _ in range(count):
        q.ended(running, 0.0, complete=True)
        (running,) = started(q)
        found.append(running)
    return found


def test_a_request_takes_a_slot_for_each_of_its_sequences() -> None:
    q = queue(limit=160)
    wide = ask(sequences=128)
    assert enter(q, wide) is Outcome.START and (q.running, q.sequences) == (1, 128)
    narrow = [ask() for _ in range(33)]
    assert [enter(q, each) for each in narrow] == [Outcome.START] * 32 + [Outcome.WAIT]
    q.ended(wide, 1.0, complete=True)
    assert started(q, 1.0) == narrow[32:] and q.sequences == 33


def test_a_request_wider_than_the_limit_starts_alone_when_the_model_is_idle() -> None:
    q = queue(limit=4)
    narrow, wide, later = ask(), ask(sequences=128), ask(at=AGED_S)
    assert [enter(q, narrow), enter(q, wide)] == [Outcome.START, Outcome.WAIT]
    # For a while narrower ones pass it ...
    passing = ask()
    assert enter(q, passing) is Outcome.START
    # ... and then the slots are kept for it.
    assert enter(q, later, AGED_S) is Outcome.WAIT
    q.ended(narrow, AGED_S, complete=True)
    assert started(q, AGED_S) == []
    q.ended(passing, AGED_S, complete=True)
    assert started(q, AGED_S) == [wide]
    q.ended(wide, AGED_S, complete=True)
    assert started(q, AGED_S) == [later]


def test_a_wide_request_starts_though_narrow_ones_of_a_better_priority_keep_coming() -> None:
    q = queue(limit=8)
    wide = ask(sequences=8, priority=5)
    running = [ask(priority=-1) for _ in range(8)]
    for each in running:
        assert enter(q, each) is Outcome.START
    assert enter(q, wide) is Outcome.WAIT
    now = 0.0
    while now < 60.0 and wide not in running:
        now += 0.25
        if enter(q, fresh := ask(at=now, priority=-1), now) is Outcome.START:
            running.append(fresh)
        q.ended(running.pop(0), now, complete=True)
        running += started(q, now)
    assert wide in running and now < AGED_S + 10.0


@pytest.mark.parametrize("flood", [3, 100])
def test_tenants_take_turns_whatever_they_have_waiting(flood: int) -> None:
    q = queue()
    enter(q, running := ask("a"))
    for _ in range(flood):
        enter(q, ask("a"))
    for _ in range(3):
        enter(q, ask("b"))
    names = [ticket.hints.tenant for ticket in order(q, running, 6)]
    assert Counter(names[:4]) == {"a": 2, "b": 2} and Counter(names) == {"a": 3, "b": 3}


def test_shares_are_of_sequences_not_of_requests() -> None:
    q = queue(limit=4)
    enter(q, running := ask("x", sequences=4))
    for _ in range(20):
        enter(q, ask("wide", sequences=4))
        enter(q, ask("narrow"))
        enter(q, ask("narrow"))
    q.ended(running, 0.0, complete=True)
    served: Counter[str] = Counter()
    inside: list[Ticket] = started(q)
    for _ in range(16):
        for ticket in inside:
            served[ticket.hints.tenant] += ticket.hints.sequences
            q.ended(ticket, 0.0, complete=True)
        inside = started(q)
    assert served["narrow"] >= 20 and abs(served["wide"] - served["narrow"]) <= 8


def test_a_tenant_that_was_idle_has_no_starts_saved_up() -> None:
    q = queue()
    enter(q, running := ask("a"))
    for _ in range(40):
        enter(q, ask("a"))
    last = order(q, running, 20)[-1]
    for _ in range(20):
        enter(q, ask("b"))
    assert Counter(ticket.hints.tenant for ticket in order(q, last, 10)) == {"a": 5, "b": 5}


def test_in_a_full_queue_a_tenant_with_few_waiting_displaces_the_last_of_the_one_with_the_most() -> None:
    q = queue(most=4)
    enter(q, ask("a"))
    flood = [ask("a") for _ in range(4)]
    for each in flood:
        enter(q, each)
    assert q.enter(ask("a"), 0.0) == (Outcome.FULL, None)
    assert q.enter(ask("b"), 0.0) == (Outcome.WAIT, flood[3])
    assert q.enter(ask("b"), 0.0) == (Outcome.WAIT, flood[2])
    # Both have two now.
    assert q.enter(ask("b"), 0.0) == (Outcome.FULL, None)
    # Nobody gives a place to a worse priority.
    assert q.enter(ask("c", priority=1), 0.0) == (Outcome.FULL, None)


def test_an_urgent_request_takes_no_place_of_a_tenant_within_its_share() -> None:
    q = queue(most=4)
    enter(q, ask("a"))
    others = [ask(tenant, priority=priority) for tenant, priority in (("b", 5), ("c", 5), ("d", 0), ("a", 1))]
    for each in others:
        enter(q, each)
    # It takes one of its own tenant that is less urgent, and then none.
    assert q.enter(ask("a", priority=-1), 0.0) == (Outcome.WAIT, others[3])
    assert q.enter(ask("a", priority=-1), 0.0) == (Outcome.FULL, None)
    assert q.enter(ask("e", priority=-1), 0.0) == (Outcome.FULL, None)


def test_of_tenants_above_their_share_the_worst_priority_gives_its_place() -> None:
    q = queue(most=5)
    enter(q, ask("a"))
    urgent = [ask("a", priority=-1) for _ in range(3)]
    late = [ask("b", priority=3) for _ in range(2)]
    for each in (*urgent, *late):
        enter(q, each)
    assert q.enter(ask("c"), 0.0) == (Outcome.WAIT, late[1])
    # `a` has the most still, all of better priorities.
    assert q.enter(ask("d"), 0.0) == (Outcome.FULL, None)
    assert q.enter(ask("d", priority=-1), 0.0) == (Outcome.WAIT, urgent[2])


def test_the_wait_of_a_tenant_is_estimated_from_its_share() -> None:
    q = queue()
    enter(q, running := ask("a"))
    for _ in range(100):
        enter(q, ask("a"))
    for second in range(1, 11):
        q.ended(running, float(second), complete=True)
        (running,) = started(q, float(second))
    own, other = q.estimated_wait_s(ask("a").hints), q.estimated_wait_s(ask("b").hints)
    assert own is not None and other is not None and own > 80 and 1.5 < other < 3
    wide = q.estimated_wait_s(ask("b", sequences=16).hints)
    assert wide is not None and 25 < wide < 40
    # So a flood does not make another tenant's deadline unreachable.
    assert q.enter(ask("b", 10.0, finish_by=30.0), 10.0)[0] is Outcome.WAIT


def test_a_request_of_a_worse_priority_starts_at_last() -> None:
    q = queue()
    enter(q, running := ask(priority=-1))
    patient = ask(priority=9)
    enter(q, patient)
    for _ in range(AGED_EVERY * 3):
        enter(q, ask(at=AGED_S, priority=-1))
    assert patient not in order(q, running, AGED_EVERY)
    # Once it has waited for long, it is among the next AGED_EVERY.
    running = ask(priority=-1)
    q = queue()
    enter(q, running), enter(q, patient := ask(priority=9))
    for _ in range(AGED_EVERY * 3):
        enter(q, ask(at=AGED_S, priority=-1))
    found = []
    for _ in range(AGED_EVERY):
        q.ended(running, AGED_S, complete=True)
        (running,) = started(q, AGED_S)
        found.append(running)
    assert patient in found and len(found) - 1 - found.index(patient) < AGED_EVERY


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("aaael"), st.integers(1, 6), st.sampled_from("xyz"), st.integers(-1, 1)), max_size=60
    )
)
def test_any_sequence_keeps_the_limit_for_wide_requests_of_all_tenants(
    steps: list[tuple[str, int, str, int]],
) -> None:
    q = queue(limit=4, most=6)
    running: list[Ticket] = []
    waiting: list[Ticket] = []
    now = 0.0
    for what, number, tenant, priority in steps:
        now += 1.0
        if what == "a":
            ticket = ask(tenant, now, sequences=number, priority=priority)
            outcome, displaced = q.enter(ticket, now)
            if displaced is not None:
                waiting.remove(displaced)
            if outcome is not Outcome.FULL:
                {Outcome.START: running, Outcome.WAIT: waiting}[outcome].append(ticket)
        elif what == "e" and running:
            q.ended(running.pop(number % len(running)), now, complete=True)
        elif what == "l" and waiting:
            q.leave(waiting.pop(number % len(waiting)))
        for ticket in started(q, now):
            waiting.remove(ticket)
            running.append(ticket)
        taken = sum(ticket.hints.sequences for ticket in running)
        assert (q.running, q.sequences, len(q)) == (len(running), taken, len(waiting))
        assert taken <= 4 or len(running) == 1
        assert running or not waiting
        # Free slots stay free only for one that has waited for long.
        fitting = [ticket for ticket in waiting if ticket.hints.sequences <= 4 - taken]
        assert not fitting or any(now - ticket.hints.arrived >= AGED_S for ticket in waiting)
    while running:
        now += 1.0
        q.ended(running.pop(), now, complete=True)
        for ticket in started(q, now):
            waiting.remove(ticket)
            running.append(ticket)
    assert not waiting and q.sequences == 0
