"""Admission queue of one model, with a clock set by the tests."""

from __future__ import annotations

import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.gateway.admission.queue import Outcome, Queue, SchedulingHints, Ticket
from tandem.gateway.admission.throughput import ThroughputEstimator


def queue(limit: int | None = 1, most: int = 10, hold_s: float = 30.0) -> Queue:
    made = Queue(max_waiting=most, hold_s=hold_s)
    made.set_limit(limit, 0.0)
    return made


def ask(at: float = 0.0, **hints: float) -> Ticket:
    return Ticket(SchedulingHints(arrived=at, **hints))  # type: ignore[arg-type]


def enter(q: Queue, ticket: Ticket, now: float = 0.0) -> Outcome:
    return q.enter(ticket, now)[0]


def started(q: Queue, now: float) -> list[Ticket]:
    return [ticket for ticket, outcome in q.pop_startable(now) if outcome is Outcome.START]


def test_requests_start_up_to_the_limit_and_the_next_waits_until_one_ends() -> None:
    q = queue(limit=2)
    first, second, third = ask(), ask(), ask()
    assert [enter(q, t) for t in (first, second, third)] == [Outcome.START, Outcome.START, Outcome.WAIT]
    assert (q.running, len(q), started(q, 1.0)) == (2, 1, [])
    q.ended(first, 1.0, complete=True)
    assert started(q, 1.0) == [third] and (q.running, len(q)) == (2, 0)


def test_without_a_limit_nobody_waits() -> None:
    q = queue(limit=None)
    assert {enter(q, ask()) for _ in range(1000)} == {Outcome.START}


def test_a_new_request_does_not_overtake_waiting_ones_when_the_limit_grows() -> None:
    q = queue()
    running, waiting = ask(), ask()
    enter(q, running), enter(q, waiting)
    q.set_limit(5, 0.0)
    late = ask()
    assert enter(q, late) is Outcome.WAIT
    assert started(q, 0.0) == [waiting, late]


def test_requests_start_by_priority_then_arrival() -> None:
    q = queue()
    running = ask()
    enter(q, running)
    asked = [(0, "a"), (5, "b"), (-1, "c"), (0, "d"), (-1, "e"), (5, "f")]
    names = {}
    for priority, name in asked:
        ticket = ask(priority=priority)
        names[ticket] = name
        enter(q, ticket)
    order = ""
    while len(q):
        q.ended(running, 0.0, complete=True)
        (running,) = started(q, 0.0)
        order += names[running]
    assert order == "ceadbf"


def test_a_full_queue_refuses_and_a_better_priority_displaces_the_last_of_the_worst() -> None:
    q = queue(most=2)
    enter(q, ask())
    kept, last = ask(priority=1), ask(priority=1)
    enter(q, kept), enter(q, last)
    assert q.enter(ask(priority=1), 0.0) == (Outcome.FULL, None)
    assert q.enter(ask(priority=7), 0.0) == (Outcome.FULL, None)
    better = ask(priority=0)
    assert q.enter(better, 0.0) == (Outcome.WAIT, last)
    assert len(q) == 2
    q.set_limit(9, 0.0)
    assert started(q, 0.0) == [better, kept]


def test_with_max_waiting_0_the_next_is_refused() -> None:
    q = queue(most=0)
    assert [enter(q, ask()), enter(q, ask())] == [Outcome.START, Outcome.FULL]


def test_leaving_the_queue_frees_the_place_at_once() -> None:
    q = queue(most=1)
    running, gone, next_one = ask(), ask(), ask()
    enter(q, running), enter(q, gone)
    q.leave(gone)
    q.leave(gone)
    assert enter(q, next_one) is Outcome.WAIT
    q.ended(running, 0.0, complete=True)
    assert started(q, 0.0) == [next_one]


def test_expired_requests_are_not_started() -> None:
    q = queue()
    running, short, patient = ask(), ask(finish_by=5.0), ask(start_by=9.0)
    enter(q, running), enter(q, short), enter(q, patient)
    assert q.pop_overdue(4.9) == []
    q.ended(running, 5.0, complete=True)
    assert list(q.pop_startable(5.0)) == [(short, Outcome.EXPIRED), (patient, Outcome.START)]
    late = ask(start_by=12.0)
    assert enter(q, late, 6.0) is Outcome.WAIT
    assert q.pop_overdue(12.0) == [(late, Outcome.EXPIRED)] and len(q) == 0


def test_a_request_without_time_for_its_kind_is_not_started_and_shorter_kinds_are() -> None:
    q = queue(limit=2)
    long, short = ask(kind=8), ask(kind=2)
    enter(q, long), enter(q, short)
    q.ended(short, 1.0, complete=True)
    q.ended(long, 10.0, complete=True)
    one, other = ask(kind=0), ask(kind=0)
    enter(q, one, 10.0), enter(q, other, 10.0)
    hopeless, hopeful = ask(kind=8, finish_by=21.0), ask(kind=2, finish_by=21.0)
    assert (enter(q, hopeless, 10.0), enter(q, hopeful, 10.0)) == (Outcome.WAIT, Outcome.WAIT)
    q.ended(one, 11.5, complete=False)
    q.ended(other, 11.5, complete=False)
    assert list(q.pop_startable(11.5)) == [(hopeless, Outcome.EXPIRED), (hopeful, Outcome.START)]


def test_a_request_that_would_wait_past_its_deadline_is_refused_on_arrival() -> None:
    q = queue(most=1000)
    running = ask()
    enter(q, running)
    for _ in range(100):
        enter(q, ask())
    for second in range(1, 21):  # two end in a second
        for half in (0.0, 0.5):
            q.ended(running, second + half, complete=False)
            (running,) = started(q, second + half)
    assert len(q) == 60
    estimated_wait_s = q.estimated_wait_s(ask().hints)
    assert estimated_wait_s is not None and 28 < estimated_wait_s < 33
    assert enter(q, ask(21.0, finish_by=21.0 + 20), 21.0) is Outcome.DEADLINE_UNREACHABLE
    assert enter(q, ask(21.0, start_by=21.0 + 20), 21.0) is Outcome.DEADLINE_UNREACHABLE
    assert enter(q, ask(21.0, finish_by=21.0 + 70), 21.0) is Outcome.WAIT
    # Of a better priority nobody is ahead of it.
    assert enter(q, ask(21.0, finish_by=21.0 + 2, priority=-1), 21.0) is Outcome.WAIT


def test_below_the_idle_share_a_request_starts_whatever_its_deadline() -> None:
    q = queue(limit=4)
    first = ask(kind=3)
    enter(q, first)
    q.ended(first, 10.0, complete=True)
    hurried = [ask(10.0, kind=3, finish_by=11.0) for _ in range(3)]
    assert [enter(q, each, 10.0) for each in hurried] == [Outcome.START, Outcome.START, Outcome.EXPIRED]
    assert enter(q, ask(10.0, kind=3, finish_by=30.0), 10.0) is Outcome.START


def test_without_a_ready_replica_requests_are_held_and_start_when_one_is_ready() -> None:
    q = queue(limit=0, hold_s=30.0)
    early, late = ask(0.0), ask(10.0)
    assert (enter(q, early, 0.0), enter(q, late, 10.0)) == (Outcome.WAIT, Outcome.WAIT)
    assert q.pop_overdue(29.9) == []
    assert q.pop_overdue(30.0) == [(early, Outcome.UNSERVED)]
    q.set_limit(8, 31.0)
    assert started(q, 31.0) == [late]
    assert q.pop_overdue(100.0) == []


def test_hold_s_does_not_apply_to_requests_waiting_for_capacity() -> None:
    q = queue(limit=2, hold_s=1.0)
    refused = ask()
    enter(q, refused), enter(q, ask()), enter(q, ask())
    q.set_limit(1, 999.0)
    q.start_cancelled(refused)
    assert q.reenter(refused, 1000.0) is Outcome.WAIT
    assert q.pop_overdue(1000.0) == []


def test_with_hold_s_0_a_request_without_a_replica_is_refused_at_once() -> None:
    assert enter(queue(limit=0, hold_s=0.0), ask()) is Outcome.UNSERVED


def test_a_requeued_request_waits_before_those_that_arrived_later() -> None:
    q = queue()
    first, second = ask(), ask()
    enter(q, first), enter(q, second)
    q.start_cancelled(first)
    q.set_limit(0, 1.0)
    assert q.reenter(first, 1.0) is Outcome.WAIT
    q.set_limit(1, 2.0)
    assert started(q, 2.0) == [first]


def test_hold_s_counts_from_the_moment_when_no_replica_is_ready() -> None:
    q = queue(hold_s=30.0)
    running, waiting = ask(), ask()
    enter(q, running), enter(q, waiting)
    q.set_limit(0, 100.0)
    q.set_limit(0, 101.0)
    assert q.pop_overdue(129.9) == []
    q.start_cancelled(running)
    assert q.reenter(running, 110.0) is Outcome.WAIT
    assert q.pop_overdue(130.0) == [(running, Outcome.UNSERVED), (waiting, Outcome.UNSERVED)]
    late = ask(131.0)
    assert enter(q, late, 131.0) is Outcome.WAIT
    assert q.pop_overdue(160.9) == [] and q.pop_overdue(161.0) == [(late, Outcome.UNSERVED)]
    q.set_limit(1, 162.0)
    q.set_limit(0, 163.0)
    assert enter(q, ask(0.0), 170.0) is Outcome.WAIT and q.pop_overdue(192.0) == []


def test_requests_that_never_waited_can_be_requeued() -> None:
    q = queue(limit=0)
    one, other = ask(), ask()
    assert [q.reenter(each, 0.0) for each in (one, other)] == [Outcome.WAIT] * 2
    q.set_limit(2, 1.0)
    assert set(started(q, 1.0)) == {one, other} and len(q) == 0


def test_the_rate_scales_with_the_limit() -> None:
    throughput = ThroughputEstimator()
    throughput.waiting_began(0.0)
    for second in range(1, 50):
        throughput.ended(float(second), 0, 1.0, complete=True)
    assert throughput.rate is not None and math.isclose(throughput.rate, 1.0, rel_tol=0.05)
    throughput.scale(4.0)
    assert throughput.rate is not None and math.isclose(throughput.rate, 4.0, rel_tol=0.05)


def test_time_with_an_empty_queue_does_not_count_for_the_rate() -> None:
    throughput = ThroughputEstimator()
    throughput.waiting_began(0.0)
    for second in range(1, 11):
        throughput.ended(float(second), 0, 1.0, complete=True)
    throughput.waiting_ended()
    throughput.ended(3600.0, 0, 1.0, complete=True)
    assert throughput.rate is not None and math.isclose(throughput.rate, 1.0, rel_tol=0.05)


def test_the_answer_time_of_a_kind_converges_to_the_90th_percentile() -> None:
    throughput, dice = ThroughputEstimator(), random.Random(7)
    for _ in range(5000):
        throughput.ended(0.0, 1, dice.uniform(1.0, 2.0), complete=True)
    assert 1.7 < throughput.answer_time_s(1) < 2.1
    assert throughput.answer_time_s(2) == 0.0


def test_an_incomplete_answer_never_lowers_the_answer_time() -> None:
    throughput = ThroughputEstimator()
    throughput.ended(0.0, 1, 4.0, complete=True)
    for _ in range(100):
        throughput.ended(0.0, 1, 0.1, complete=False)
    assert throughput.answer_time_s(1) == 4.0
    for _ in range(100):
        throughput.ended(0.0, 1, 8.0, complete=False)
    assert 8.0 < throughput.answer_time_s(1) < 12.0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("aaaerlx"), st.integers(-2, 2), st.integers(0, 3)), max_size=80))
def test_any_sequence_keeps_the_limit_and_loses_no_request(steps: list[tuple[str, int, int]]) -> None:
    q = queue(limit=2, most=4, hold_s=3.0)
    running: list[Ticket] = []
    waiting: list[Ticket] = []
    again: set[Ticket] = set()
    """Those that were taken back, beyond the bound if need be."""
    now = 0.0
    for what, priority, number in steps:
        now += 1.0
        if what == "a":
            ticket = ask(now, priority=priority, start_by=now + 5 * number if number else math.inf)
            outcome, displaced = q.enter(ticket, now)
            if displaced is not None:
                waiting.remove(displaced)
            if outcome in (Outcome.START, Outcome.WAIT):
                (running if outcome is Outcome.START else waiting).append(ticket)
            assert outcome is not Outcome.START or q.running <= (q.limit or 0)
        elif what == "e" and running:
            q.ended(running.pop(number % len(running)), now, complete=True)
        elif what == "r" and running:
            ticket = running.pop(number % len(running))
            q.start_cancelled(ticket)
            outcome = q.reenter(ticket, now)
            assert outcome in (Outcome.START, Outcome.WAIT, Outcome.EXPIRED, Outcome.UNSERVED)
            assert outcome is not Outcome.EXPIRED or now >= ticket.hints.start_by
            assert outcome is not Outcome.UNSERVED or q.limit == 0
            if outcome in (Outcome.START, Outcome.WAIT):
                (running if outcome is Outcome.START else waiting).append(ticket)
                again.add(ticket)
        elif what == "l" and waiting:
            q.leave(waiting.pop(number % len(waiting)))
        elif what == "x":
            q.set_limit(number, now)
        for ticket, outcome in [*q.pop_overdue(now), *q.pop_startable(now)]:
            waiting.remove(ticket)
            # None is too late that has all the time there is; none goes for want of a replica where one is ready.
            assert outcome is not Outcome.EXPIRED or now >= ticket.hints.start_by
            assert outcome is not Outcome.UNSERVED or q.limit == 0
            if outcome is Outcome.START:
                running.append(ticket)
        assert (q.running, len(q)) == (len(running), len(waiting))
        assert len(set(waiting) - again) <= 4
        if waiting:
            assert len(running) >= (q.limit or 0)


def test_reasons_in_metrics_are_the_names_of_outcomes() -> None:
    assert all(outcome.value == outcome.name.lower() for outcome in Outcome)
