"""What a replica says of a request that it gives no answer to: real HTTP, echo engines that die."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import httpx
import pytest
from overload_world import Mortal

from tandem.engine.protocol import AdapterRef
from tandem.errors import EngineError
from tandem.serve.host import EngineHost
from tandem.serve.records import TOKEN_HEADER, UNAVAILABLE_HEADER, adapter_headers

ROUTE = "/v1/completions"
ADAPTER = AdapterRef(id="red@1", path="/red")


@contextlib.asynccontextmanager
async def replica(engine: Mortal) -> AsyncIterator[httpx.AsyncClient]:
    host = EngineHost(engine, max_adapters=1)
    await host.start()
    async with httpx.AsyncClient(base_url=host.url, headers={TOKEN_HEADER: host.token}, timeout=10) as http:
        yield http
    await host.drain(0)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_dies_within_a_request_is_told_from_one_that_was_dead_before(stream: bool) -> None:
    async with replica(Mortal()) as http:
        for prompt, expected in (("well", None), ("poison", "died"), ("next", "dead")):
            answer = await http.post(ROUTE, json={"model": "base", "prompt": prompt, "stream": stream})
            assert answer.headers.get(UNAVAILABLE_HEADER) == expected
            assert answer.status_code == (503 if expected else 200)


async def test_an_engine_that_dies_of_loading_an_adapter_has_died_of_the_request() -> None:
    class Choking(Mortal):
        async def load_adapter(self, adapter: AdapterRef) -> None:
            self.die()
            raise EngineError("The engine is dead.")

    async with replica(Choking()) as http:
        for expected in ("died", "dead"):
            body = {"model": ADAPTER.id, "prompt": "x"}
            answer = await http.post(ROUTE, json=body, headers=adapter_headers(ADAPTER))
            assert (answer.status_code, answer.headers[UNAVAILABLE_HEADER]) == (503, expected)
