"""Refusals of a replica's guard: real HTTP, echo engines that die."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

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
