"""Limits that several gateways share: one ledger, asked in batches; shares of it while it does not answer."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from tandem.auth.principal import Limits
from tandem.gateway.accounting import limiter as module
from tandem.gateway.accounting.limiter import Limiter
from tandem.limits import Answer, DayTotals, Exchange, LimitLedger, Moment, Reservation, Subject


@dataclass
class Shared:
    """The directory's side, which can be away, stopped for a while, or replaced."""

    ledger: LimitLedger = field(default_factory=LimitLedger)
    away: bool = False
    stopped: asyncio.Event | None = None
    """While it is not set, calls wait: the directory's process is stopped, and works them off later."""
    calls: int = 0

    async def apply(self, exchange: Exchange) -> Answer:
        self.calls += 1
        if self.stopped is not None:
            # What has arrived is applied even if the caller has gone.
            return await asyncio.shield(asyncio.create_task(self._apply_later(exchange, self.stopped)))
        await asyncio.sleep(0.01)
        if self.away:
            raise ConnectionError("the directory is away")
        return self.ledger.exchange(exchange, Moment.now())

    async def _apply_later(self, exchange: Exchange, stopped: asyncio.Event) -> Answer:
        await stopped.wait()
        return self.ledger.exchange(exchange, Moment.now())


def reservation(limits: Limits, tokens: int = 1) -> Reservation:
    return Reservation(uuid.uuid4().hex, (Subject("key:k", limits),), tokens)


async def two(shared: Shared, **options: object) -> tuple[Limiter, Limiter]:
    both = tuple(Limiter(name, gateways=2, apply=shared.apply, **options) for name in ("a", "b"))  # type: ignore[arg-type]
    for each in both:
        await each.start()
    return both[0], both[1]


async def test_two_gateways_admit_together_exactly_what_the_limit_allows():
    shared = Shared()
    a, b = await two(shared)
    limits = Limits(requests_per_minute=51)
    verdicts = await asyncio.gather(*(each.admit(reservation(limits)) for _ in range(100) for each in (a, b)))
    assert sum(verdict.refusal is None for verdict in verdicts) == 51
    assert shared.calls <= 20  # operations that come together go together
    await asyncio.gather(a.stop(), b.stop())


async def test_what_ends_at_one_gateway_is_free_for_the_other():
    a, b = await two(Shared())
    limits = Limits(concurrent_requests=1)
    first = reservation(limits)
    assert (await a.admit(first)).refusal is None
    assert (await b.admit(reservation(limits))).refusal is not None
    a.settle(first.id, 5)
    await asyncio.sleep(0.1)
    assert (await b.admit(reservation(limits))).refusal is None
    await asyncio.gather(a.stop(), b.stop())


async def today(**tokens: int) -> DayTotals:
    return DayTotals(Moment.now().day, {f"key:{name}": count for name, count in tokens.items()})


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.02)


async def test_while_the_ledger_is_away_each_gateway_admits_its_share():
    shared = Shared(away=True)
    a, b = await two(shared)
    limits = Limits(requests_per_minute=5)
    for each in (a, b):
        admitted = [await each.admit(reservation(limits)) for _ in range(6)]
        assert sum(verdict.refusal is None for verdict in admitted) == 3
    await asyncio.gather(a.stop(), b.stop())


async def test_while_the_ledger_is_away_the_budget_of_a_day_is_not_divided():
    a, b = await two(Shared(away=True), totals=lambda: today(k=60))
    limits = Limits(tokens_per_day=100)
    assert (await a.admit(reservation(limits, tokens=30))).refusal is None
    assert (await b.admit(reservation(limits, tokens=41))).refusal is not None
    await asyncio.gather(a.stop(), b.stop())


async def test_requests_do_not_ask_a_ledger_that_did_not_answer(monkeypatch):
    monkeypatch.setattr(module, "ANSWER_S", 0.1)
    shared = Shared(stopped=asyncio.Event())
    limiter = Limiter("a", gateways=2, apply=shared.apply)
    await limiter.start()
    assert (await limiter.admit(reservation(Limits(requests_per_minute=100)))).refusal is None
    calls = shared.calls
    for _ in range(40):
        await limiter.admit(reservation(Limits(requests_per_minute=100)))
    assert shared.calls <= calls + 1  # the probe, once a second
    await limiter.stop()


async def test_what_was_admitted_without_the_ledger_is_told_when_it_answers_again(monkeypatch):
    monkeypatch.setattr(module, "IDLE_S", 0.05)
    shared = Shared(away=True)
    a, b = await two(shared)
    limits = Limits(concurrent_requests=2)
    first = reservation(limits)
    assert (await a.admit(first)).refusal is None
    shared.away = False
    await until(lambda: shared.ledger.in_flight("key:k") == 1)
    a.settle(first.id, 1)
    await until(lambda: shared.ledger.in_flight("key:k") == 0)
    await asyncio.gather(a.stop(), b.stop())


async def test_an_error_of_any_kind_leaves_no_request_without_a_verdict(monkeypatch):
    monkeypatch.setattr(module, "IDLE_S", 0.05)
    answers = iter([Answer(()), None, Answer((None, None, None))])

    async def broken(exchange: Exchange) -> Answer:
        return next(answers)  # type: ignore[return-value]

    limiter = Limiter("a", gateways=2, apply=broken)
    await limiter.start()
    async with asyncio.timeout(5):
        for _ in range(5):
            assert (await limiter.admit(reservation(Limits(requests_per_minute=100)))).refusal is None
            await asyncio.sleep(0.1)
    await limiter.stop()


async def test_a_new_ledger_learns_what_is_in_flight_and_todays_tokens_without_a_look_at_the_database():
    shared, reads = Shared(), 0

    async def totals() -> DayTotals:
        nonlocal reads
        reads += 1
        return await today(k=90)

    a, b = await two(shared, totals=totals)
    limits = Limits(concurrent_requests=1, tokens_per_day=100)
    first = reservation(limits, tokens=5)
    assert (await a.admit(first)).refusal is None
    shared.ledger = LimitLedger()
    await until(lambda: shared.ledger.in_flight("key:k") == 1)
    refused = (await b.admit(reservation(limits))).refusal
    assert refused is not None and refused.limit == "concurrent_requests"
    a.settle(first.id, 5)
    await until(lambda: shared.ledger.in_flight("key:k") == 0)
    assert (await b.admit(reservation(limits, tokens=6))).refusal is not None
    assert (await b.admit(reservation(limits, tokens=5))).refusal is None
    assert reads == 2
    await asyncio.gather(a.stop(), b.stop())


async def test_a_request_that_is_cancelled_while_it_asks_holds_nothing():
    shared = Shared()
    a, b = await two(shared)
    limits = Limits(concurrent_requests=1)
    asking = asyncio.create_task(a.admit(reservation(limits)))
    await asyncio.sleep(0.001)
    asking.cancel()
    await asyncio.sleep(0.2)
    assert shared.ledger.in_flight("key:k") == 0
    assert (await b.admit(reservation(limits))).refusal is None
    await asyncio.gather(a.stop(), b.stop())


async def test_requests_that_a_stopped_ledger_admits_later_do_not_stay_in_flight(monkeypatch):
    monkeypatch.setattr(module, "ANSWER_S", 0.1)
    monkeypatch.setattr(module, "IDLE_S", 0.05)
    monkeypatch.setattr(module, "SILENT_S", 0.2)
    shared = Shared()
    a, b = await two(shared)
    limits = Limits(concurrent_requests=10)
    before = [reservation(limits) for _ in range(2)]
    await asyncio.gather(*map(a.admit, before))
    shared.stopped = stopped = asyncio.Event()
    during = [reservation(limits) for _ in range(3)]
    await asyncio.gather(*map(a.admit, during))
    await asyncio.sleep(0.5)  # what has ended is not kept for the ledger any more
    for each in (before[0], during[0]):
        a.settle(each.id, 1)
    stopped.set()
    shared.stopped = None
    await until(lambda: shared.ledger.in_flight("key:k") == 3)
    for each in (before[1], *during[1:]):
        a.settle(each.id, 1)
    await until(lambda: shared.ledger.in_flight("key:k") == 0)
    await asyncio.sleep(0.3)
    assert shared.ledger.in_flight("key:k") == 0
    await asyncio.gather(a.stop(), b.stop())


async def test_nothing_collects_for_a_ledger_that_stays_away(monkeypatch):
    monkeypatch.setattr(module, "SILENT_S", 0.2)
    limiter = Limiter("a", gateways=2, apply=Shared(away=True).apply)
    await limiter.start()
    await limiter.admit(reservation(Limits(requests_per_minute=100)))
    await asyncio.sleep(0.3)
    for _ in range(30):
        one = reservation(Limits(requests_per_minute=100))
        await limiter.admit(one)
        limiter.settle(one.id, 1)
    assert limiter._pending_settles == [] and limiter._pending == []
    await limiter.stop()
