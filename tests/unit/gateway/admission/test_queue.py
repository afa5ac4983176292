"""Who starts, who waits and who is refused: the queue of one model, with a clock that the tests set."""

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


def test_as_many_start_as_may_and_the_next_waits_until_one_ends() -> None:
    q = queue(limit=2)
    first, second, third = ask(), ask(), ask()
    assert [enter(q, t) for t in (first, second, third)] == [Outcome.START, Outcome.START, Outcome.WAIT]
    assert (q.running, len(q), started(q, 1.0)) == (2, 1, [])
    q.ended(first, 1.0, complete=True)
    assert started(q, 1.0) == [third] and (q.running, len(q)) == (2, 0)


def test_without_a_limit_nobody_waits() -> None:
    q = queue(limit=None)
    assert {enter(q, ask()) for _ in range(1000)} == {Outcome.START}


def test_nobody_overtakes_those_that_wait_when_there_is_room_again() -> None:
    q = queue()
    running, waiting = ask(), ask()
    enter(q, running), enter(q, waiting)
    q.set_limit(5, 0.0)
    late = ask()
    assert enter(q, late) is Outcome.WAIT
    assert started(q, 0.0) == [waiting, late]


def test_the_better_priority_starts_first_and_within_one_the_first_that_came() -> None:
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


def test_beyond_the_bound_the_next_is_refused_and_a_better_one_takes_the_last_place_of_the_worst() -> None:
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


def test_where_nobody_may_wait_the_next_is_refused() -> None:
    q = queue(most=0)
    assert [enter(q, ask()), enter(q, ask())] == [Outcome.START, Outcome.FULL]


def test_who_leaves_frees_its_place_at_once() -> None:
    q = queue(most=1)
    running, gone, next_one = ask(), ask(), ask()
    enter(q, running), enter(q, gone)
    q.leave(gone)
    q.leave(gone)
    assert enter(q, next_one) is Outcome.WAIT
    q.ended(running, 0.0, complete=True)
    assert started(q, 0.0) == [next_one]


def test_expired_work_is_not_started() -> None:
    q = queue()
    running, short, patient = ask(), ask(finish_by=5.0), ask(start_by=9.0)
    enter(q, running), enter(q, short), enter(q, patient)
    assert q.pop_overdue(4.9) == []
    q.ended(running, 5.0, complete=True)
    assert list(q.pop_startable(5.0)) == [(short, Outcome.EXPIRED), (patient, Outcome.START)]
    late = ask(start_by=12.0)
    assert enter(q, late, 6.0) is Outcome.WAIT
    assert q.pop_overdue(12.0) == [(late, Outcome.EXPIRED)] and len(q) == 0


def test_what_cannot_be_answered_in_the_time_left_is_not_started_and_shorter_kinds_are() -> None:
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


def test_who_would_wait_longer_than_it_has_time_is_refused_at_once_by_the_measured_rate() -> None:
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
    estimated_wait_s = q.estimated_wait_s(0)
    assert estimated_wait_s is not None and 28 < estimated_wait_s < 33
    assert enter(q, ask(21.0, finish_by=21.0 + 20), 21.0) is Outcome.DEADLINE_UNREACHABLE
    assert enter(q, ask(21.0, start_by=21.0 + 20), 21.0) is Outcome.DEADLINE_UNREACHABLE
    assert enter(q, ask(21.0, finish_by=21.0 + 70), 21.0) is Outcome.WAIT
    # Of a better priority nobody is ahead of it.
    assert enter(q, ask(21.0, finish_by=21.0 + 2, priority=-1), 21.0) is Outcome.WAIT


def test_with_much_room_a_request_starts_however_little_time_it_has_and_with_little_it_does_not() -> None:
    q = queue(limit=4)
    first = ask(kind=3)
    enter(q, first)
    q.ended(first, 10.0, complete=True)
    hurried = [ask(10.0, kind=3, finish_by=11.0) for _ in range(3)]
    assert [enter(q, each, 10.0) for each in hurried] == [Outcome.START, Outcome.START, Outcome.EXPIRED]
    assert enter(q, ask(10.0, kind=3, finish_by=30.0), 10.0) is Outcome.START


def test_without_a_ready_replica_requests_are_held_for_a_while_and_start_when_one_comes() -> None:
    q = queue(limit=0, hold_s=30.0)
    early, late = ask(0.0), ask(10.0)
    assert (enter(q, early, 0.0), enter(q, late, 10.0)) == (Outcome.WAIT, Outcome.WAIT)
    assert q.pop_overdue(29.9) == []
    assert q.pop_overdue(30.0) == [(early, Outcome.UNSERVED)]
    q.set_limit(8, 31.0)
    assert started(q, 31.0) == [late]
    assert q.pop_overdue(100.0) == []


def test_one_that_waits_for_room_is_not_told_that_there_is_no_replica() -> None:
    q = queue(limit=2, hold_s=1.0)
    refused = ask()
    enter(q, refused), enter(q, ask()), enter(q, ask())
    q.set_limit(1, 999.0)
    q.start_cancelled()
    assert q.reenter(refused, 1000.0) is Outcome.WAIT
    assert q.pop_overdue(1000.0) == []


def test_without_holding_a_request_is_refused_at_once_where_no_replica_is_ready() -> None:
    assert enter(queue(limit=0, hold_s=0.0), ask()) is Outcome.UNSERVED


def test_what_no_replica_took_waits_before_those_that_came_after_it() -> None:
    q = queue()
    first, second = ask(), ask()
    enter(q, first), enter(q, second)
    q.start_cancelled()
    q.set_limit(0, 1.0)
    assert q.reenter(first, 1.0) is Outcome.WAIT
    q.set_limit(1, 2.0)
    assert started(q, 2.0) == [first]


def test_who_waited_for_room_is_held_as_long_as_any_other_from_when_no_replica_is_ready() -> None:
    q = queue(hold_s=30.0)
    running, waiting = ask(), ask()
    enter(q, running), enter(q, waiting)
    q.set_limit(0, 100.0)
    q.set_limit(0, 101.0)
    assert q.pop_overdue(129.9) == []
    q.start_cancelled()
    assert q.reenter(running, 110.0) is Outcome.WAIT
    assert q.pop_overdue(130.0) == [(running, Outcome.UNSERVED), (waiting, Outcome.UNSERVED)]
    late = ask(131.0)
    assert enter(q, late, 131.0) is Outcome.WAIT
    assert q.pop_overdue(160.9) == [] and q.pop_overdue(161.0) == [(late, Outcome.UNSERVED)]
    q.set_limit(1, 162.0)
    q.set_limit(0, 163.0)
    assert enter(q, ask(0.0), 170.0) is Outcome.WAIT and q.pop_overdue(192.0) == []


def test_those_that_never_waited_before_have_places_of_their_own() -> None:
    q = queue(limit=0)
    one, other = ask(), ask()
    assert [q.reenter(each, 0.0) for each in (one, other)] == [Outcome.WAIT] * 2
    q.set_limit(2, 1.0)
    assert set(started(q, 1.0)) == {one, other} and len(q) == 0


def test_the_rate_follows_the_room_that_there_is() -> None:
    throughput = ThroughputEstimator()
    throughput.waiting_began(0.0)
    for second in range(1, 50):
        throughput.ended(float(second), 0, 1.0, complete=True)
    assert throughput.rate is not None and math.isclose(throughput.rate, 1.0, rel_tol=0.05)
    throughput.scale(4.0)
    assert throughput.rate is not None and math.isclose(throughput.rate, 4.0, rel_tol=0.05)


def test_time_without_anybody_who_waits_says_nothing_of_the_rate() -> None:
    throughput = ThroughputEstimator()
    throughput.waiting_began(0.0)
    for second in range(1, 11):
        throughput.ended(float(second), 0, 1.0, complete=True)
    throughput.waiting_ended()
    throughput.ended(3600.0, 0, 1.0, complete=True)
    assert throughput.rate is not None and math.isclose(throughput.rate, 1.0, rel_tol=0.05)


def test_the_time_of_a_kind_comes_to_rest_where_nine_of_ten_answers_are_shorter() -> None:
    throughput, dice = ThroughputEstimator(), random.Random(7)
    for _ in range(5000):
        throughput.ended(0.0, 1, dice.uniform(1.0, 2.0), complete=True)
    assert 1.7 < throughput.answer_time_s(1) < 2.1
    assert throughput.answer_time_s(2) == 0.0


def test_an_answer_that_was_cut_off_says_only_that_it_takes_longer() -> None:
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
def test_whatever_happens_no_more_run_than_may_and_nobody_is_lost(steps: list[tuple[str, int, int]]) -> None:
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
            q.start_cancelled()
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
