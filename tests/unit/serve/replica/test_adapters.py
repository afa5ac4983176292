from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from tandem.engine.echo.engine import EchoEngine
from tandem.engine.protocol import AdapterRef
from tandem.errors import AdapterError, EngineError
from tandem.serve.replica.adapters import AdapterSlots, SlotsBusyError


def ref(name: str, path: str = "/x") -> AdapterRef:
    return AdapterRef(id=name, path=path)


async def test_many_requests_for_one_adapter_load_it_once() -> None:
    engine = EchoEngine(delay_s=0.01)
    slots = AdapterSlots(engine, 2)
    await asyncio.gather(*(slots.load(ref("red@1")) for _ in range(20)))
    assert engine.loads == ["red@1"]


async def test_the_least_recently_used_adapter_is_evicted() -> None:
    engine = EchoEngine()
    slots = AdapterSlots(engine, 2)
    for name in ("a", "b", "a", "c"):
        await slots.load(ref(name))
    assert set(slots.resident) == {"a", "c"} == set(engine.stats().adapters)


async def test_an_adapter_in_use_is_never_unloaded() -> None:
    slots = AdapterSlots(EchoEngine(), 1)
    async with slots.hold(ref("a")):
        with pytest.raises(SlotsBusyError, match="All 1 adapter slots"):
            await slots.load(ref("b"), wait_s=0.05)
        assert slots.waiting == 0
        assert not await slots.unload("a")
        waiting = asyncio.create_task(slots.load(ref("c")))
        await asyncio.sleep(0.02)
        assert slots.resident == ("a",)
    await waiting
    assert "a" not in slots.resident


async def test_a_disconnect_does_not_cancel_a_load_that_others_wait_for() -> None:
    engine = EchoEngine(delay_s=0.05)
    slots = AdapterSlots(engine, 1)
    first = asyncio.create_task(slots.load(ref("a")))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(slots.load(ref("a")))
    await asyncio.sleep(0.01)
    first.cancel()
    await second
    assert engine.loads == ["a"]


async def test_an_adapter_that_cannot_be_loaded_fails_its_requests_only() -> None:
    slots = AdapterSlots(EchoEngine(), 1)
    with pytest.raises(AdapterError, match="cannot be loaded"):
        await slots.load(ref("bad", "/broken"))
    await slots.load(ref("good"))
    assert slots.resident == ("good",)


async def test_without_slots_an_adapter_is_refused() -> None:
    with pytest.raises(EngineError, match="max_adapters"):
        await AdapterSlots(EchoEngine(), 0).load(ref("a"))


async def test_host_memory_keeps_adapters_beyond_the_slots() -> None:
    engine = EchoEngine()
    slots = AdapterSlots(engine, 1, cached=3)
    for name in ("a", "b", "c", "a", "b", "c"):
        await slots.load(ref(name))
    assert engine.loads == ["a", "b", "c"]
    assert slots.resident == ("a", "b", "c") and slots.in_slots == ("c",)


async def test_requests_in_flight_use_at_most_as_many_adapters_as_there_are_slots() -> None:
    slots = AdapterSlots(EchoEngine(), 2, cached=4)
    seen: list[int] = []
    using: Counter[str] = Counter()

    async def ask(name: str) -> None:
        async with slots.hold(ref(name)):
            using[name] += 1
            seen.append(len(+using))
            await asyncio.sleep(0.002)
            using[name] -= 1

    await asyncio.gather(*(ask(f"a{i % 7}") for i in range(70)))
    assert max(seen) == 2 and len(seen) == 70


async def test_pinned_adapters_are_loaded_at_once_and_never_evicted() -> None:
    engine = EchoEngine()
    slots = AdapterSlots(engine, 1, cached=2)
    slots.set_pinned([ref("pin")])
    await wait_for(lambda: slots.resident == ("pin",))
    for name in ("a", "b", "c"):
        await slots.load(ref(name))
    assert slots.resident == ("pin", "c") and engine.loads.count("pin") == 1
    slots.set_pinned([])
    for name in ("d", "e"):
        await slots.load(ref(name))
    assert slots.resident == ("d", "e")


async def test_pinned_adapters_that_do_not_fit_are_reported_with_the_reason() -> None:
    slots = AdapterSlots(EchoEngine(), 1, cached=3)
    slots.set_pinned([ref("bad", "/broken"), ref("good"), ref("many")])
    await wait_for(lambda: "good" in slots.resident and "bad" in slots.problems)
    assert "cannot be loaded" in slots.problems["bad"] and "3, and 2 can be kept" in slots.problems["many"]


async def test_an_adapter_whose_files_are_bad_never_reaches_the_engine() -> None:
    engine = EchoEngine()

    def prepare(adapter: AdapterRef) -> AdapterRef:
        if adapter.id == "bad":
            raise AdapterError("its rank is wrong")
        return replace(adapter, path="/here")

    slots = AdapterSlots(engine, 1, prepare=prepare)
    for _ in range(2):
        with pytest.raises(AdapterError, match="its rank is wrong"):
            await slots.load(ref("bad"))
    await slots.load(ref("good"))
    assert engine.loads == ["good"] and engine._adapters["good"].path == "/here"


async def test_a_refused_adapter_is_refused_for_a_while_without_a_load() -> None:
    class Counting(EchoEngine):
        asked = 0

        async def load_adapter(self, adapter: AdapterRef) -> None:
            self.asked += 1
            await super().load_adapter(adapter)

    engine = Counting()
    slots = AdapterSlots(engine, 1)
    for _ in range(3):
        with pytest.raises(AdapterError, match="cannot be loaded"):
            await slots.load(ref("bad", "/broken"))
    assert engine.asked == 1 and slots.resident == ()


async def test_a_disconnect_while_waiting_for_a_slot_admits_the_next() -> None:
    slots = AdapterSlots(EchoEngine(), 1)
    async with slots.hold(ref("a")):
        first, second = (asyncio.create_task(slots.load(ref(name))) for name in ("b", "c"))
        await asyncio.sleep(0.01)
        first.cancel()
    await second
    assert slots.resident == ("c",)


async def wait_for(happened: Callable[[], bool]) -> None:
    for _ in range(500):
        if happened():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")
