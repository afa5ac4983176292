"""Fetches of adapter files: they have threads of their own, and end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from tandem.engine.echo.engine import EchoEngine
from tandem.engine.protocol import AdapterRef
from tandem.errors import AdapterError, StorageError
from tandem.serve.replica import adapter_fetches
from tandem.serve.replica.adapter_fetches import MAX_CONCURRENT, AdapterFetches
from tandem.serve.replica.adapters import AdapterSlots


class Store:
    """Hangs on adapters in s3://hangs until `free` is set; refuses those in s3://wrong."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.begun = 0

    def __call__(self, adapter: AdapterRef) -> AdapterRef:
        self.begun += 1
        if "hangs" in adapter.path:
            self.free.wait(60)
        if "wrong" in adapter.path:
            raise AdapterError("it has no weights")
        return AdapterRef(id=adapter.id, path="/here")


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store()
    yield made
    made.free.set()


def ref(name: str, path: str) -> AdapterRef:
    return AdapterRef(id=name, path=path)


async def test_a_fetch_gives_the_path_here_or_raises_the_reason(store: Store) -> None:
    fetches = AdapterFetches(store)
    assert (await fetches.fetch(ref("a@1", "s3://well/a"))).path == "/here"
    with pytest.raises(AdapterError, match="no weights"):
        await fetches.fetch(ref("a@1", "s3://wrong/a"))


async def test_a_fetch_that_hangs_ends_with_an_error_and_frees_its_place(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_fetches, "FETCH_TIMEOUT_S", 0.1)
    fetches = AdapterFetches(store)
    hanging = [fetches.fetch(ref(f"a{n}@1", "s3://hangs/a")) for n in range(MAX_CONCURRENT)]
    for error in await asyncio.gather(*hanging, return_exceptions=True):
        assert isinstance(error, StorageError) and "within 0.1 s" in str(error)
    monkeypatch.setattr(adapter_fetches, "FETCH_TIMEOUT_S", 20.0)
    assert (await fetches.fetch(ref("b@1", "s3://well/b"))).path == "/here"


async def test_hanging_fetches_delay_neither_other_work_in_threads_nor_local_adapters(store: Store) -> None:
    fetches = AdapterFetches(store)
    hanging = [asyncio.create_task(fetches.fetch(ref(f"a{n}@1", "s3://hangs/a"))) for n in range(100)]
    async with asyncio.timeout(20):
        while store.begun < MAX_CONCURRENT:
            await asyncio.sleep(0.01)
        assert await asyncio.to_thread(lambda: "free") == "free"
        assert (await fetches.fetch(ref("b@1", "/disk/b"))).path == "/here"
    assert store.begun == MAX_CONCURRENT + 1
    for task in hanging:
        task.cancel()
    await asyncio.gather(*hanging, return_exceptions=True)


async def test_a_store_that_keeps_hanging_is_not_asked_for_ever(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_fetches, "FETCH_TIMEOUT_S", 0.02)
    monkeypatch.setattr(adapter_fetches, "MAX_HANGING", 2)
    fetches = AdapterFetches(store)
    for _ in range(2):
        with pytest.raises(StorageError, match="were not here"):
            await fetches.fetch(ref("a@1", "s3://hangs/a"))
    with pytest.raises(StorageError, match="2 fetches of adapters hang"):
        await fetches.fetch(ref("b@1", "s3://hangs/b"))
    assert store.begun == 2
    store.free.set()
    async with asyncio.timeout(20):
        while any(thread.is_alive() for thread in fetches._hanging):
            await asyncio.sleep(0.01)
    assert (await fetches.fetch(ref("c@1", "s3://well/c"))).path == "/here"


async def test_an_adapter_whose_fetch_hangs_is_refused_and_can_be_loaded_later(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_fetches, "FETCH_TIMEOUT_S", 0.1)
    engine = EchoEngine()
    slots = AdapterSlots(engine, 1, prepare=store)
    with pytest.raises(StorageError, match="were not here"):
        await slots.load(ref("a@1", "s3://hangs/a"))
    assert slots.resident == ()
    store.free.set()
    monkeypatch.setattr(adapter_fetches, "FETCH_TIMEOUT_S", 20.0)
    await slots.load(ref("a@1", "s3://hangs/a"))
    assert slots.resident == ("a@1",)
