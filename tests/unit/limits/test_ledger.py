"""Limits of keys and tenants: what is admitted, refused and charged."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from tandem.auth.principal import Limits
from tandem.limits import (
    Admit,
    Answer,
    DayTotals,
    Exchange,
    LimitLedger,
    Moment,
    Reservation,
    Settle,
    Subject,
    Verdict,
)
from tandem.limits.ledger import SILENT_S
from tandem.limits.records import DAY_S
from tandem.limits.window import SlidingWindow

MIDNIGHT = 20_000.0 * DAY_S
NOW = MIDNIGHT + 3600


def at(seconds: float) -> Moment:
    return Moment(seconds, seconds)


def ask(ledger: LimitLedger, limits: Limits, *, id_: str = "r", tokens: int = 10, now: float = NOW) -> Verdict:
    (verdict,) = ledger.apply("g", [Admit(Reservation(id_, (Subject("key:k", limits),), tokens))], at(now))
    return verdict


def test_requests_in_a_minute_are_limited_and_free_again_after_it():
    ledger, limits = LimitLedger(), Limits(requests_per_minute=2)
    assert ask(ledger, limits, id_="a").requests == (2, 1, 61.0)
    assert ask(ledger, limits, id_="b", now=NOW + 10).refusal is None
    refusal = ask(ledger, limits, id_="c", now=NOW + 20).refusal
    assert refusal is not None and (refusal.limit, refusal.maximum, refusal.used) == ("requests_per_minute", 2, 2)
    assert 40 <= refusal.retry_s <= 41
    assert ask(ledger, limits, id_="c", now=NOW + 20 + refusal.retry_s).refusal is None


def test_tokens_are_reserved_at_the_start_and_charged_at_the_end():
    ledger, limits = LimitLedger(), Limits(tokens_per_minute=100)
    assert ask(ledger, limits, id_="a", tokens=80).tokens == (100, 20, 61.0)
    assert ask(ledger, limits, id_="b", tokens=30).refusal is not None
    ledger.apply("g", [Settle("a", 15)], at(NOW + 1))
    assert ask(ledger, limits, id_="b", tokens=30, now=NOW + 1).tokens == (100, 55, 61.0)
    # More than was reserved counts too.
    ledger.apply("g", [Settle("b", 95)], at(NOW + 2))
    refusal = ask(ledger, limits, id_="c", tokens=1, now=NOW + 2).refusal
    assert refusal is not None and refusal.used == 110


def test_a_request_that_needs_more_than_the_limit_is_told_so():
    refusal = ask(LimitLedger(), Limits(tokens_per_minute=100), tokens=101).refusal
    assert refusal is not None and refusal.retry_s == math.inf


def test_concurrent_requests_are_limited_until_one_ends():
    ledger, limits = LimitLedger(), Limits(concurrent_requests=1)
    assert ask(ledger, limits, id_="a").refusal is None
    assert ask(ledger, limits, id_="b").refusal is not None
    ledger.apply("g", [Settle("a", None)], at(NOW))
    assert ask(ledger, limits, id_="b").refusal is None


def test_the_budget_of_a_day_counts_what_is_in_flight_and_ends_at_midnight():
    ledger, limits = LimitLedger(), Limits(tokens_per_day=100)
    assert ask(ledger, limits, id_="a", tokens=60).refusal is None
    refusal = ask(ledger, limits, id_="b", tokens=60).refusal
    assert refusal is not None and (refusal.limit, refusal.used, refusal.retry_s) == (
        "tokens_per_day",
        60,
        DAY_S - 3600,
    )
    ledger.apply("g", [Settle("a", 40)], at(NOW))
    assert ask(ledger, limits, id_="b", tokens=60).refusal is None
    ledger.apply("g", [Settle("b", 60)], at(NOW))
    assert ask(ledger, limits, id_="c", tokens=1).refusal is not None
    assert ask(ledger, limits, id_="c", tokens=100, now=NOW + DAY_S).refusal is None


def test_tokens_of_the_database_count_in_the_budget_without_being_counted_twice():
    ledger, limits = LimitLedger(), Limits(tokens_per_day=100)
    ledger.observe_day(DayTotals(at(NOW).day, {"key:k": 50}), at(NOW))
    assert ask(ledger, limits, id_="a", tokens=51).refusal is not None
    assert ask(ledger, limits, id_="a", tokens=50).refusal is None
    ledger.apply("g", [Settle("a", 20)], at(NOW))
    ledger.observe_day(DayTotals(at(NOW).day, {"key:k": 70}), at(NOW))
    assert ask(ledger, limits, id_="b", tokens=30).refusal is None
    assert ask(ledger, limits, id_="c", tokens=1).refusal is not None


def test_a_refused_request_leaves_no_trace_at_the_limits_that_it_passed():
    ledger = LimitLedger()
    key, tenant = Subject("key:k", Limits(requests_per_minute=5)), Subject("tenant:t", Limits(concurrent_requests=0))
    for _ in range(3):
        (verdict,) = ledger.apply("g", [Admit(Reservation("r", (key, tenant), 1))], at(NOW))
        assert verdict.refusal is not None and verdict.refusal.subject == "tenant:t"
        assert verdict.requests is not None and verdict.requests.remaining == 5


def send(
    ledger: LimitLedger,
    gateway: str,
    number: int,
    now: float,
    *operations: Admit | Settle,
    reservations: tuple[Reservation, ...] | None = None,
) -> Answer:
    return ledger.exchange(Exchange(gateway, number, operations, reservations), at(now))


ONE = Reservation("a", (Subject("key:k", Limits(concurrent_requests=1, tokens_per_minute=100)),), 60)


def test_requests_of_a_gateway_that_is_not_heard_of_count_as_ended():
    ledger = LimitLedger()
    send(ledger, "killed", 1, NOW, Admit(ONE), reservations=())
    send(ledger, "g", 1, NOW, reservations=())
    for second in range(1, 11):
        send(ledger, "g", 1 + second, NOW + second)
    assert ledger.in_flight("key:k") == 1
    send(ledger, "g", 12, NOW + SILENT_S + 1)
    assert ledger.in_flight("key:k") == 0


def test_a_pause_of_the_ledger_is_nobodys_silence():
    ledger = LimitLedger()
    send(ledger, "a", 1, NOW, Admit(ONE), reservations=())
    send(ledger, "b", 1, NOW, reservations=())
    assert send(ledger, "b", 2, NOW + 100) == Answer()
    assert ledger.in_flight("key:k") == 1
    # From then on a gateway that is not heard of is silent after 10 s.
    for second in range(1, 12):
        send(ledger, "b", 2 + second, NOW + 100 + second)
    assert ledger.in_flight("key:k") == 0


def test_a_gateway_that_was_silent_tells_what_is_in_flight_before_anything_else_is_applied():
    ledger = LimitLedger()
    send(ledger, "a", 1, NOW, Admit(ONE), reservations=())
    for second in range(12):
        send(ledger, "b", 1 + second, NOW + second, reservations=())
    assert ledger.in_flight("key:k") == 0
    assert send(ledger, "a", 2, NOW + 12, Admit(ONE._replace(id="b"))) == Answer(resend=True)
    assert ledger.in_flight("key:k") == 0
    assert send(ledger, "a", 3, NOW + 12, reservations=(ONE,)) == Answer()
    assert ledger.in_flight("key:k") == 1
    # It has not been charged twice: 60 of 100 tokens are used, by the request that is in flight.
    (verdict,) = send(ledger, "a", 4, NOW + 12, Settle("a", 60), Admit(ONE._replace(id="c", tokens=40))).verdicts
    assert verdict.refusal is None and verdict.tokens is not None and verdict.tokens.remaining == 0


def test_requests_that_a_gateway_does_not_name_have_ended():
    ledger = LimitLedger()
    send(ledger, "g", 1, NOW, Admit(ONE), reservations=())
    send(ledger, "g", 2, NOW + 1, reservations=())
    assert ledger.in_flight("key:k") == 0


def test_what_is_settled_together_with_the_list_is_charged_what_it_used():
    ledger = LimitLedger()
    send(ledger, "g", 1, NOW, Admit(ONE), reservations=())
    send(ledger, "g", 2, NOW + 1, Settle("a", 10), reservations=())
    (verdict,) = send(ledger, "g", 3, NOW + 1, Admit(ONE._replace(id="b"))).verdicts
    assert verdict.tokens is not None and verdict.tokens.remaining == 30


def test_an_exchange_that_arrives_after_a_later_one_changes_nothing():
    ledger = LimitLedger()
    send(ledger, "g", 2, NOW, reservations=())
    assert send(ledger, "g", 1, NOW, Admit(ONE)) == Answer()
    assert ledger.in_flight("key:k") == 0


def test_a_new_ledger_takes_over_what_is_in_flight():
    ledger = LimitLedger()
    assert send(ledger, "g", 5, NOW, Settle("a", 5)) == Answer(resend=True)
    send(ledger, "g", 6, NOW, reservations=(ONE, ONE))
    assert ledger.in_flight("key:k") == 1
    send(ledger, "g", 7, NOW, Settle("a", 10), Settle("a", 10))
    assert ledger.in_flight("key:k") == 0


def test_totals_of_another_day_change_nothing():
    ledger, limits = LimitLedger(), Limits(tokens_per_day=100)
    yesterday = DayTotals(at(MIDNIGHT - 1).day, {"key:k": 100})
    ledger.observe_day(yesterday, at(MIDNIGHT + 1))
    assert ask(ledger, limits, tokens=100, now=MIDNIGHT + 1).refusal is None


def test_a_wall_clock_that_is_set_changes_the_day_and_nothing_else():
    ledger, limits = LimitLedger(), Limits(requests_per_minute=1)
    one = Admit(Reservation("a", (Subject("key:k", limits),), 1))
    ledger.apply("g", [one], Moment(100.0, NOW))
    (verdict,) = ledger.apply("g", [one], Moment(110.0, NOW - 3600))
    assert verdict.refusal is not None and verdict.refusal.retry_s <= 61
    (verdict,) = ledger.apply("g", [one], Moment(162.0, NOW - 3600))
    assert verdict.refusal is None


def test_a_request_whose_tokens_are_not_known_is_charged_what_was_seen_of_it():
    ledger, limits = LimitLedger(), Limits(tokens_per_minute=1000, tokens_per_day=1000)
    for id_, seen in (("a", 300), ("b", 5)):
        ask(ledger, limits, id_=id_, tokens=50)
        ledger.apply("g", [Settle(id_, None, seen)], at(NOW))
    verdict = ask(ledger, limits, id_="c", tokens=650)
    # 300 for the first, the reservation of 50 for the second; the day is told by the database.
    assert verdict.refusal is None and verdict.tokens is not None and verdict.tokens.remaining == 0


def test_accounts_are_kept_while_something_counts_against_them():
    ledger = LimitLedger()
    ledger.observe_day(DayTotals(at(NOW).day, {"key:budget": 7}), at(NOW))
    ask(ledger, Limits(tokens_per_minute=100), id_="a")
    ledger.apply("g", [Settle("a", 10)], at(NOW))
    ledger.apply("g", [], at(NOW + 200))
    assert ledger.subjects == {"key:budget"}
    ledger.apply("g", [], at(NOW + DAY_S))
    assert ledger.subjects == set()


STEPS = st.lists(st.tuples(st.floats(0, 20), st.integers(1, 40), st.integers(-30, 30)), max_size=60)


@given(STEPS)
def test_no_span_of_a_minute_has_more_than_the_limit(steps: list[tuple[float, int, int]]):
    """Whatever is reserved, and corrected downwards, when."""
    window, limit, now = SlidingWindow(60), 100, 1000.0
    taken: list[tuple[float, int]] = []
    for pause, amount, correction in steps:
        now += pause
        if window.wait_s(amount, limit, now):
            continue
        window.add(amount, now)
        change = max(-amount, min(0, correction))
        window.correct(change, now, now)
        taken.append((now, amount + change))
        for begin, _ in taken:
            assert sum(each for at, each in taken if begin <= at < begin + 60) <= limit
    assert window.total(now + 62) == 0


@given(STEPS)
def test_after_the_wait_that_is_told_an_amount_fits(steps: list[tuple[float, int, int]]):
    window, now = SlidingWindow(60), 1000.0
    for pause, amount, _ in steps:
        now += pause
        wait_s = window.wait_s(amount, 100, now)
        assert window.wait_s(amount, 100, now + wait_s) == 0
        if not wait_s:
            window.add(amount, now)
