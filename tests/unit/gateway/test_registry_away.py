"""Gateway without its registry: requests that need it get 503 with Retry-After, others are answered."""

from __future__ import annotations

import sqlite3

import pytest
from gateway_world import BODY, World, echo
from gateway_world import world as world

from tandem.gateway import catalog

ADMIN = {"Authorization": "Bearer secret"}
RED = BODY | {"model": "red"}


async def test_without_the_database_adapters_and_lists_are_503_and_base_models_answer(world: World) -> None:
    await world.add_engine(echo())
    world.adapter("red")
    world.registry.close()
    database = (world.folder / "tandem.db").rename(world.folder / "elsewhere.db")
    (world.folder / "tandem.db").mkdir()
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
    database.rename(world.folder / "tandem.db")
    assert (await world.http.post("/v1/completions", json=RED)).json()["model"] == "red@1"


async def test_a_hanging_database_delays_a_request_by_its_timeout_at_most(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "ANSWER_S", 0.2)
    await world.add_engine(echo())
    world.adapter("red")
    # Nobody polls the database for keys meanwhile: a connection of its own would keep the lock away.
    await world.app.state.identity.keys.stop()
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
    assert (await world.http.post("/v1/completions", json=RED)).json()["model"] == "red@1"
