"""Limits that several gateways share: one ledger, asked in batches; shares of it while it does not answer."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass, field

from tandem.auth.principal import Limits
from tandem.gateway.accounting import limiter as module
from tandem.gateway.accounting.limiter import Limiter
from tandem.limits import LimitLedger, Reservation, Subject, Verdict
from tandem.limits.ledger import Operation


@dataclass
class Shared:
    """The directory's side, which can be away or replaced."""

    ledger: LimitLedger = field(default_factory=LimitLedger)
    id: str = "one"
    away: bool = False
    calls: int = 0

    async def apply(
        self, gateway: str, operations: tuple[Operation, ...], totals: dict[str, int] | None
    ) -> tuple[str, list[Verdict]]:
        self.calls += 1
        await asyncio.sleep(0.01)
        if self.away:
            raise ConnectionError("the directory is away")
        if totals is not None:
            self.ledger.observe_day(totals, time.time())
        return self.id, self.ledger.apply(gateway, operations, time.time())


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


async def test_while_the_ledger_is_away_each_gateway_admits_its_share(monkeypatch):
    monkeypatch.setattr(module, "ANSWER_S", 0.2)
    shared = Shared(away=True)
    a, b = await two(shared)
    limits = Limits(requests_per_minute=5)
    for each in (a, b):
        admitted = [await each.admit(reservation(limits)) for _ in range(6)]
        assert sum(verdict.refusal is None for verdict in admitted) == 3
    await asyncio.gather(a.stop(), b.stop())


async def test_a_new_ledger_learns_what_is_in_flight_and_todays_tokens():
    shared = Shared()
    a, b = await two(shared, totals=lambda: {"key:k": 90})
    limits = Limits(concurrent_requests=1, tokens_per_day=100)
    first = reservation(limits, tokens=5)
    assert (await a.admit(first)).refusal is None
    shared.ledger, shared.id = LimitLedger(), "two"
    await asyncio.sleep(1.3)  # gateways call every second
    refused = (await b.admit(reservation(limits))).refusal
    assert refused is not None and refused.limit == "concurrent_requests"
    a.settle(first.id, 5)
    await asyncio.sleep(0.2)
    assert (await b.admit(reservation(limits, tokens=6))).refusal is not None
    assert (await b.admit(reservation(limits, tokens=5))).refusal is None
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


async def test_a_request_that_was_admitted_twice_is_ended_at_the_ledger_whose_answer_was_late(monkeypatch):
    monkeypatch.setattr(module, "ANSWER_S", 0.1)
    shared, slow = Shared(), True

    async def late(
        gateway: str, operations: tuple[Operation, ...], totals: dict[str, int] | None
    ) -> tuple[str, list[Verdict]]:
        answer = await shared.apply(gateway, operations, totals)
        if slow:
            await asyncio.sleep(0.3)
        return answer

    limiter = Limiter("a", gateways=2, apply=late)
    await limiter.start()
    first = reservation(Limits(concurrent_requests=5))
    assert (await limiter.admit(first)).refusal is None
    assert shared.ledger.in_flight("key:k") == 1  # it had been applied before the answer was late
    slow = False
    limiter.settle(first.id, 5)
    await asyncio.sleep(1.3)  # gateways call every second
    assert shared.ledger.in_flight("key:k") == 0
    await limiter.stop()


async def test_nothing_collects_for_a_ledger_that_stays_away(monkeypatch):
    monkeypatch.setattr(module, "SILENT_S", 0.2)
    limiter = Limiter("a", gateways=2, apply=Shared(away=True).apply)
    await limiter.start()
    for _ in range(30):
        await limiter.admit(reservation(Limits(requests_per_minute=100)))
    await asyncio.sleep(0.3)
    await limiter.admit(reservation(Limits(requests_per_minute=100)))
    await asyncio.sleep(1.1)
    assert limiter._pending == []
    await limiter.stop()
