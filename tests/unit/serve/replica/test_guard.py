"""Refusals of a replica's guard: real HTTP, echo engines that die."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
from overload_world import Mortal

from tandem.engine.echo.engine import EchoEngine
from tandem.engine.protocol import AdapterRef
from tandem.errors import EngineError
from tandem.routing.records import ALIVE_PATH, TOKEN_HEADER, UNAVAILABLE_HEADER, adapter_headers
from tandem.serve.replica.host import EngineHost

ROUTE = "/v1/completions"
ADAPTER = AdapterRef(id="red@1", path="/red")


@contextlib.asynccontextmanager
async def replica(engine: EchoEngine) -> AsyncIterator[tuple[EngineHost, httpx.AsyncClient]]:
    host = EngineHost(engine, max_adapters=1)
    await host.start()
    async with httpx.AsyncClient(base_url=host.url, headers={TOKEN_HEADER: host.token}, timeout=10) as http:
        yield host, http
    await host.drain(0)


@pytest.mark.parametrize("stream", [False, True])
async def test_died_during_a_request_is_distinguished_from_dead_before(stream: bool) -> None:
    async with replica(Mortal()) as (_, http):
        for prompt, expected in (("well", None), ("poison", "died"), ("next", "dead")):
            answer = await http.post(ROUTE, json={"model": "base", "prompt": prompt, "stream": stream})
            assert answer.headers.get(UNAVAILABLE_HEADER) == expected
            assert answer.status_code == (503 if expected else 200)


async def test_an_engine_that_dies_loading_an_adapter_counts_as_died() -> None:
    class Choking(Mortal):
        async def load_adapter(self, adapter: AdapterRef) -> None:
            self.die()
            raise EngineError("The engine is dead.")

    async with replica(Choking()) as (_, http):
        for expected in ("died", "dead"):
            body = {"model": ADAPTER.id, "prompt": "x"}
            answer = await http.post(ROUTE, json=body, headers=adapter_headers(ADAPTER))
            assert (answer.status_code, answer.headers[UNAVAILABLE_HEADER]) == (503, expected)


async def test_draining_waits_for_requests_that_wait_for_their_adapter() -> None:
    asked, loaded = threading.Event(), threading.Event()

    class Slow(EchoEngine):
        async def load_adapter(self, adapter: AdapterRef) -> None:
            asked.set()
            await asyncio.to_thread(loaded.wait, 10)
            await super().load_adapter(adapter)

    async with replica(Slow()) as (host, http):
        body = {"model": ADAPTER.id, "prompt": "one two", "stream": True}
        asking = asyncio.create_task(http.post(ROUTE, json=body, headers=adapter_headers(ADAPTER)))
        await asyncio.to_thread(asked.wait, 10)
        draining = asyncio.create_task(host.drain(30))
        # Several times as long as the server takes to close its port once it is told to.
        for _ in range(5):
            await asyncio.sleep(0.1)
            async with httpx.AsyncClient(base_url=host.url, headers={TOKEN_HEADER: host.token}) as another:
                assert (await another.get(ALIVE_PATH)).status_code == 503
        loaded.set()
        assert (await asking).text.endswith("data: [DONE]\n\n")
        await draining


OTHER = AdapterRef(id="blue@1", path="/blue")


async def test_a_client_that_leaves_while_it_waits_for_a_slot_leaves_the_queue() -> None:
    engine = EchoEngine(delay_s=0.05)
    async with replica(engine) as (host, http):
        long = {"model": ADAPTER.id, "prompt": "word " * 100, "stream": True}
        holding = asyncio.create_task(http.post(ROUTE, json=long, headers=adapter_headers(ADAPTER)))
        await until(lambda: engine.stats().running == 1)
        body = {"model": OTHER.id, "prompt": "x" * 200_000}
        leaving = [asyncio.create_task(http.post(ROUTE, json=body, headers=adapter_headers(OTHER))) for _ in range(3)]
        await until(lambda: host.waiting == 3)
        for each in leaving:
            each.cancel()
        # A slot would come free after 5 s only, and a waiting request give up after 30.
        await until(lambda: host.waiting == 0)
        assert not holding.done() and (await holding).status_code == 200 and engine.loads == [ADAPTER.id]
        # What was read while a request waited reaches the engine.
        kept = await http.post(ROUTE, json={"model": OTHER.id, "prompt": "kept"}, headers=adapter_headers(OTHER))
        assert kept.json()["choices"][0]["text"] == "kept"


async def test_a_client_that_leaves_while_its_adapter_loads_holds_no_slot() -> None:
    loaded = threading.Event()

    class Slow(EchoEngine):
        async def load_adapter(self, adapter: AdapterRef) -> None:
            await asyncio.to_thread(loaded.wait, 10)
            await super().load_adapter(adapter)

    engine = Slow()
    async with replica(engine) as (host, http):
        body = {"model": ADAPTER.id, "prompt": "x"}
        leaving = asyncio.create_task(http.post(ROUTE, json=body, headers=adapter_headers(ADAPTER)))
        await until(lambda: host._guard.in_flight == 1)
        leaving.cancel()
        await until(lambda: host._guard.in_flight == 0)
        loaded.set()
        # The slot is free for another adapter.
        answer = await http.post(ROUTE, json=body | {"model": OTHER.id}, headers=adapter_headers(OTHER))
        assert answer.status_code == 200 and engine.stats().steps == 1


async def until(happened: Callable[[], bool]) -> None:
    """Wait for something that must come."""
    for _ in range(6000):
        if happened():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come")
