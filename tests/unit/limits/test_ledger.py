"""Limits of keys and tenants: what is admitted, refused and charged."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from tandem.auth.principal import Limits
from tandem.limits import Admit, LimitLedger, Reservation, Restore, Settle, Subject, Verdict
from tandem.limits.ledger import DAY_S, SILENT_S
from tandem.limits.window import SlidingWindow

MIDNIGHT = 20_000.0 * DAY_S
NOW = MIDNIGHT + 3600


def ask(
    ledger: LimitLedger, limits: Limits, *, id_: str = "r", tokens: int = 10, now: float = NOW, gateway: str = "g"
) -> Verdict:
    (verdict,) = ledger.apply(gateway, [Admit(Reservation(id_, (Subject("key:k", limits),), tokens))], now)
    return verdict


def test_requests_in_a_minute_are_limited_and_free_again_after_it():
    ledger, limits = LimitLedger(), Limits(requests_per_minute=2)
    assert ask(ledger, limits, id_="a").requests == (2, 1, 61.0)
    assert ask(ledger, limits, id_="b", now=NOW + 10).refusal is None
    refusal = ask(ledger, limits, id_="c", now=NOW + 20).refusal
    assert refusal is not None and (refusal.limit, refusal.most, refusal.used) == ("requests_per_minute", 2, 2)
    assert 40 <= refusal.retry_s <= 41
    assert ask(ledger, limits, id_="c", now=NOW + 20 + refusal.retry_s).refusal is None


def test_tokens_are_reserved_at_the_start_and_charged_at_the_end():
    ledger, limits = LimitLedger(), Limits(tokens_per_minute=100)
    assert ask(ledger, limits, id_="a", tokens=80).tokens == (100, 20, 61.0)
    assert ask(ledger, limits, id_="b", tokens=30).refusal is not None
    ledger.apply("g", [Settle("a", 15)], NOW + 1)
    assert ask(ledger, limits, id_="b", tokens=30, now=NOW + 1).tokens == (100, 55, 61.0)
    # More than was reserved counts too.
    ledger.apply("g", [Settle("b", 95)], NOW + 2)
    refusal = ask(ledger, limits, id_="c", tokens=1, now=NOW + 2).refusal
    assert refusal is not None and refusal.used == 110


def test_a_request_that_needs_more_than_the_limit_is_told_so():
    refusal = ask(LimitLedger(), Limits(tokens_per_minute=100), tokens=101).refusal
    assert refusal is not None and refusal.retry_s == math.inf


def test_concurrent_requests_are_limited_until_one_ends():
    ledger, limits = LimitLedger(), Limits(concurrent_requests=1)
    assert ask(ledger, limits, id_="a").refusal is None
    assert ask(ledger, limits, id_="b").refusal is not None
    ledger.apply("g", [Settle("a", None)], NOW)
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
    ledger.apply("g", [Settle("a", 40)], NOW)
    assert ask(ledger, limits, id_="b", tokens=60).refusal is None
    ledger.apply("g", [Settle("b", 60)], NOW)
    assert ask(ledger, limits, id_="c", tokens=1).refusal is not None
    assert ask(ledger, limits, id_="c", tokens=100, now=NOW + DAY_S).refusal is None


def test_tokens_of_the_database_count_in_the_budget_without_being_counted_twice():
    ledger, limits = LimitLedger(), Limits(tokens_per_day=100)
    ledger.observe_day({"key:k": 50}, NOW)
    assert ask(ledger, limits, id_="a", tokens=51).refusal is not None
    assert ask(ledger, limits, id_="a", tokens=50).refusal is None
    ledger.apply("g", [Settle("a", 20)], NOW)
    ledger.observe_day({"key:k": 70}, NOW)
    assert ask(ledger, limits, id_="b", tokens=30).refusal is None
    assert ask(ledger, limits, id_="c", tokens=1).refusal is not None


def test_a_refused_request_leaves_no_trace_at_the_limits_that_it_passed():
    ledger = LimitLedger()
    key, tenant = Subject("key:k", Limits(requests_per_minute=5)), Subject("tenant:t", Limits(concurrent_requests=0))
    for _ in range(3):
        (verdict,) = ledger.apply("g", [Admit(Reservation("r", (key, tenant), 1))], NOW)
        assert verdict.refusal is not None and verdict.refusal.subject == "tenant:t"
        assert verdict.requests is not None and verdict.requests.remaining == 5


def test_requests_of_a_gateway_that_is_not_heard_of_count_as_ended():
    ledger, limits = LimitLedger(), Limits(concurrent_requests=1)
    assert ask(ledger, limits, id_="a", gateway="killed").refusal is None
    assert ask(ledger, limits, id_="b", now=NOW + SILENT_S).refusal is not None
    ledger.apply("g", [], NOW + SILENT_S + 1)
    assert ask(ledger, limits, id_="b", now=NOW + SILENT_S + 1).refusal is None


def test_a_new_ledger_takes_over_what_is_in_flight():
    ledger, limits = LimitLedger(), Limits(concurrent_requests=1, requests_per_minute=1)
    reservation = Reservation("a", (Subject("key:k", limits),), 10)
    ledger.apply("g", [Restore(reservation), Restore(reservation)], NOW)
    assert ledger.in_flight("key:k") == 1
    assert ask(ledger, limits, id_="b").refusal is not None
    ledger.apply("g", [Settle("a", 10), Settle("a", 10)], NOW)
    assert ledger.in_flight("key:k") == 0


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
