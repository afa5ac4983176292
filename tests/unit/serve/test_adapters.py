from __future__ import annotations

import asyncio

import pytest

from tandem.engine.echo import EchoEngine
from tandem.engine.protocol import AdapterRef
from tandem.errors import EngineError
from tandem.serve.adapters import AdapterSlots, SlotsBusyError


def ref(name: str, path: str = "/x") -> AdapterRef:
    return AdapterRef(id=name, path=path)


async def test_many_requests_for_one_adapter_load_it_once() -> None:
    engine = EchoEngine(delay_s=0.01)
    slots = AdapterSlots(engine, 2)
    await asyncio.gather(*(slots.load(ref("red@1")) for _ in range(20)))
    assert engine.loads == ["red@1"]


async def test_the_longest_unused_adapter_makes_room() -> None:
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
        assert not await slots.unload("a")
        waiting = asyncio.create_task(slots.load(ref("c")))
        await asyncio.sleep(0.02)
        assert slots.resident == ("a",)
    await waiting
    assert "a" not in slots.resident


async def test_a_client_that_leaves_does_not_cancel_the_load_others_wait_for() -> None:
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
    with pytest.raises(EngineError, match="cannot be loaded"):
        await slots.load(ref("bad", "/broken"))
    await slots.load(ref("good"))
    assert slots.resident == ("good",)


async def test_without_slots_an_adapter_is_refused() -> None:
    with pytest.raises(EngineError, match="max_adapters"):
        await AdapterSlots(EchoEngine(), 0).load(ref("a"))
