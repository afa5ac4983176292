"""A PostgreSQL server that is stopped: it takes connections and statements, and answers none."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections.abc import Iterator

import gateway_world
import psutil
import pytest
from gateway_world import BODY, World, echo
from gateway_world import world as world
from postgresql import Server

from tandem.gateway.models.registry_reads import RegistryReads
from tandem.registry import Registry, upgrade

RED = BODY | {"model": "red"}


@pytest.fixture(autouse=True)
def database(postgresql_server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a database of its own, which `world` has its registry in."""
    url = postgresql_server.create(uuid.uuid4().hex)
    upgrade(url)
    monkeypatch.setattr(gateway_world, "Registry", lambda _: Registry(url))
    return url


@contextlib.contextmanager
def stopped(server: Server) -> Iterator[None]:
    """The server and all its processes stopped for the length of a block."""
    assert server.process is not None
    main = psutil.Process(server.process.pid)
    processes = [main, *main.children(recursive=True)]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


async def test_known_adapters_and_lists_are_answered_while_postgresql_is_stopped(
    world: World, postgresql_server: Server
) -> None:
    await world.add_engine(echo())
    for name in ("red", "blue"):
        world.adapter(name)
    assert (await world.http.post("/v1/completions", json=RED)).json()["model"] == "red@1"
    assert len((await world.http.get("/v1/models")).json()["data"]) == 3
    with stopped(postgresql_server):
        for _ in range(20):
            assert (await world.http.post("/v1/completions", json=RED)).json()["model"] == "red@1"
            assert len((await world.http.get("/v1/models")).json()["data"]) == 3
            assert (await world.http.post("/v1/completions", json=BODY)).status_code == 200
            await asyncio.sleep(0.2)
        unknown = await world.http.post("/v1/completions", json=BODY | {"model": "blue"})
        assert unknown.status_code == 503 and unknown.json()["error"]["code"] == "registry_unavailable"
    async with asyncio.timeout(30):
        while (await world.http.post("/v1/completions", json=BODY | {"model": "blue"})).status_code != 200:
            await asyncio.sleep(0.1)
    world.adapter("red", rank=4)
    assert (await world.http.post("/v1/completions", json=RED)).json()["model"] == "red@2"


async def test_no_thread_is_left_waiting_for_a_stopped_server(database: str, postgresql_server: Server) -> None:
    reads = RegistryReads(Registry(database).impatient(), name="left-waiting")
    first = await reads.read(Registry.revision, 10.0)
    reads.start()
    with stopped(postgresql_server):
        # One look finds that nobody answers; later ones open connections, which time out.
        async with asyncio.timeout(30):
            while not reads.is_unreachable:
                await asyncio.sleep(0.1)
        assert await reads.revision() is None
        await asyncio.sleep(4.0)
        async with asyncio.timeout(20):
            while _threads("left-waiting") > 1:
                await asyncio.sleep(0.1)
        await reads.stop()
        async with asyncio.timeout(20):
            while _threads("left-waiting"):
                await asyncio.sleep(0.1)
    assert first == 0


def _threads(name: str) -> int:
    return sum(thread.name.startswith(name) for thread in threading.enumerate())
