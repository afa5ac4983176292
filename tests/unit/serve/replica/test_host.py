from __future__ import annotations

import asyncio

import httpx
import pytest

from tandem.engine.echo.engine import EchoEngine
from tandem.engine.protocol import AdapterRef
from tandem.errors import EngineError
from tandem.routing.records import adapter_headers
from tandem.serve.replica.guard import LOAD_PATH, UNLOAD_PATH
from tandem.serve.replica.host import EngineHost

BODY = {"model": "echo", "prompt": "one two three"}


async def started(engine: EchoEngine, **options: object) -> EngineHost:
    host = EngineHost(engine, max_adapters=1, **options)  # type: ignore[arg-type]
    await host.start()
    return host


def client(host: EngineHost, token: str | None = None) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=host.url, headers={"x-tandem-token": token or host.token}, timeout=10)


async def test_only_a_bearer_of_the_token_reaches_the_listed_routes() -> None:
    host = await started(EchoEngine())
    async with client(host) as good, client(host, "wrong") as bad:
        assert (await bad.post("/v1/completions", json=BODY)).status_code == 401
        assert (await good.post("/v1/completions", json=BODY)).json()["choices"][0]["text"] == "one two three"
        assert (await good.post("/invocations", json=BODY)).status_code == 404
        assert (await good.get("/v1/completions")).status_code == 404
    await host.drain(0)


async def test_a_request_that_names_an_adapter_finds_it_loaded() -> None:
    engine = EchoEngine()
    host = await started(engine)
    ref = AdapterRef(id="röd@1", path="/å b")
    async with client(host) as http:
        answer = await http.post("/v1/completions", json=BODY | {"model": ref.id}, headers=adapter_headers(ref))
        assert answer.json()["model"] == ref.id
        broken = AdapterRef(id="bad@1", path="/broken")
        answer = await http.post("/v1/completions", json=BODY | {"model": "bad@1"}, headers=adapter_headers(broken))
        assert answer.status_code == 400 and "cannot be loaded" in answer.text
        assert answer.json()["error"]["code"] == "adapter_refused"
    await host.drain(0)


async def test_control_routes_load_and_unload() -> None:
    engine = EchoEngine()
    host = await started(engine)
    async with client(host) as http:
        assert (await http.post(LOAD_PATH, json={"id": "a@1", "path": "/a"})).json() == {
            "done": True,
            "adapters": ["a@1"],
        }
        assert (await http.post(UNLOAD_PATH, json={"id": "a@1"})).json() == {"done": True, "adapters": []}
        assert (await http.post(LOAD_PATH, content=b"[")).status_code == 400
        assert (await http.post(LOAD_PATH, json={"id": "a@1"})).status_code == 400
    await host.drain(0)


async def test_a_dead_engine_is_503_and_says_that_another_replica_may_be_asked() -> None:
    engine = EchoEngine(delay_s=0.2)
    changes: list[int] = []
    host = await started(engine, on_change=lambda: changes.append(1))
    async with client(host) as http:
        running = asyncio.create_task(http.post("/v1/completions", json=BODY))
        await asyncio.sleep(0.1)
        engine.die()
        answer = await http.post("/v1/completions", json=BODY)
        assert answer.status_code == 503 and answer.headers["x-tandem-unavailable"] == "dead"
        assert changes and not host.alive
        await running
    await host.drain(0)


async def test_draining_lets_running_requests_end_and_refuses_new_ones() -> None:
    engine = EchoEngine(delay_s=1.0)
    host = await started(engine)
    async with client(host) as http:
        running = asyncio.create_task(http.post("/v1/completions", json=BODY))
        async with asyncio.timeout(30):
            while not engine.stats().running:
                await asyncio.sleep(0.01)
        draining = asyncio.create_task(host.drain(10))
        await asyncio.sleep(0.1)
        refused = await http.post("/v1/completions", json=BODY)
        assert refused.headers["x-tandem-unavailable"] == "draining"
        assert (await running).status_code == 200
        await draining
    assert not host.alive


async def test_an_engine_that_cannot_start_says_why() -> None:
    class Broken(EchoEngine):
        async def start(self) -> None:
            raise EngineError("no such model")

    with pytest.raises(EngineError, match="no such model"):
        await started(Broken())
