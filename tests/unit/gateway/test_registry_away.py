"""Gateway without its registry: what is known is served, what needs the registry gets 503 with Retry-After."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import httpx
import pytest
from gateway_world import BODY, World, echo
from gateway_world import world as world

from tandem.gateway.models import catalog, registry_reads

ADMIN = {"Authorization": "Bearer secret"}
RED = BODY | {"model": "red"}


def take_away(world: World) -> Path:
    """Put a folder in the database's place, and end the connections to it; returns where it is."""
    world.registry.close()
    moved = (world.folder / "tandem.db").rename(world.folder / "elsewhere.db")
    (world.folder / "tandem.db").mkdir()
    for reads in (world.app.state.catalog._reads, world.app.state.catalog._list_reads):
        reads._registry.close()
    return moved


async def answered(world: World, status: int) -> httpx.Response:
    """The answer to a request for `red`, once it has this status."""
    async with asyncio.timeout(20):
        while (answer := await world.http.post("/v1/completions", json=RED)).status_code != status:
            await asyncio.sleep(0.05)
    return answer


async def test_without_the_database_unknown_adapters_and_lists_are_503_and_base_models_answer(world: World) -> None:
    await world.add_engine(echo())
    world.adapter("red")
    moved = take_away(world)
    asked = {
        "/v1/completions": await world.http.post("/v1/completions", json=RED),
        "/v1/messages": await world.http.post("/v1/messages", json=RED | {"messages": [], "max_tokens": 4}),
        "/v1/models": await world.http.get("/v1/models"),
        "/admin/adapters": await world.http.get("/admin/adapters", headers=ADMIN),
        "/admin/adapters/red": await world.http.get("/admin/adapters/red", headers=ADMIN),
    }
    for path, answer in asked.items():
        assert answer.status_code == (529 if "messages" in path else 503), (path, answer.text)
        assert answer.headers["retry-after"] == "7" and "7 s" in answer.json()["error"]["message"]
        # Where the database is, only the operator hears.
        assert ("tandem.db" in answer.text) == path.startswith("/admin")
    assert (await world.http.post("/v1/completions", json=BODY)).status_code == 200
    (world.folder / "tandem.db").rmdir()
    moved.rename(world.folder / "tandem.db")
    assert (await answered(world, 200)).json()["model"] == "red@1"


async def test_without_the_database_known_adapters_and_lists_are_served_from_memory(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.add_engine(echo())
    world.adapter("red")
    assert (await world.http.post("/v1/completions", json=RED)).json()["model"] == "red@1"
    assert [card["id"] for card in (await world.http.get("/v1/models")).json()["data"]] == ["base", "red"]
    moved = take_away(world)
    reads = world.app.state.catalog._reads
    async with asyncio.timeout(20):
        while not reads.is_unreachable:
            await asyncio.sleep(0.05)
    asked = 0

    async def count(*args: object) -> None:
        nonlocal asked
        asked += 1
        raise AssertionError("a request for what is known waits for a registry that is away")

    with monkeypatch.context() as patched:
        patched.setattr(reads, "read", count)
        reads._poll_task.cancel()
        for _ in range(3):
            assert (await world.http.post("/v1/completions", json=RED)).json()["model"] == "red@1"
            assert [card["id"] for card in (await world.http.get("/v1/models")).json()["data"]] == ["base", "red"]
    assert asked == 0
    reads.start()
    assert sum("Known adapters are served from memory" in record.message for record in caplog.records) == 1
    (world.folder / "tandem.db").rmdir()
    moved.rename(world.folder / "tandem.db")
    # What was registered and promoted meanwhile is served as soon as the database answers.
    world.adapter("red", rank=4)
    async with asyncio.timeout(20):
        while (await world.http.post("/v1/completions", json=RED)).json()["model"] != "red@2":
            await asyncio.sleep(0.05)
    assert sum("answers again" in record.message for record in caplog.records) == 1


async def test_a_known_adapter_is_not_served_for_longer_than_the_bound(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.add_engine(echo())
    world.adapter("red")
    assert (await world.http.post("/v1/completions", json=RED)).status_code == 200
    take_away(world)
    assert (await world.http.post("/v1/completions", json=RED)).status_code == 200
    monkeypatch.setattr(catalog, "STALE_S", 0.0)
    assert (await world.http.post("/v1/completions", json=RED)).json()["error"]["code"] == "registry_unavailable"


async def test_a_hanging_database_delays_a_request_by_its_timeout_at_most(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "ANSWER_S", 0.2)
    monkeypatch.setattr(registry_reads, "REVISION_S", 0.2)
    await world.add_engine(echo())
    world.adapter("red")
    # Nobody polls the database meanwhile: a connection of its own would keep the lock away.
    await world.app.state.identity.keys.stop()
    await world.app.state.work.worker.stop()
    await world.app.state.work.model_answers.stop()
    await world.app.state.files.upkeep.stop()
    reads = world.app.state.catalog._reads
    reads._poll_task.cancel()
    reads._registry.close()
    world.registry.close()
    holder = sqlite3.connect(world.folder / "tandem.db", isolation_level=None)
    holder.execute("PRAGMA journal_mode=DELETE")
    holder.execute("BEGIN EXCLUSIVE")
    for _ in range(2):
        answer = await world.http.post("/v1/completions", json=RED, timeout=5)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
        assert answer.json()["error"]["code"] == "registry_unavailable"
    assert (await world.http.post("/v1/completions", json=BODY)).status_code == 200
    holder.execute("ROLLBACK")
    holder.close()
    monkeypatch.setattr(catalog, "ANSWER_S", 10.0)
    assert (await answered(world, 200)).json()["model"] == "red@1"
