"""`/health`: the status of the app for everybody, and numbers of replicas for those who may use the models."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx

from tandem.auth import KeyStore, Role
from tandem.config import ServedModelConfig
from tandem.gateway.app import create_app
from tandem.registry import Registry
from tandem.routing.records import ServedModel, Snapshot


def served(name: str, tenant: str | None) -> ServedModel:
    config = ServedModelConfig(model=name, engine="vllm")
    return ServedModel(id=f"{name}@1", name=name, path="", config=config, tenant=tenant)


async def never(version: int) -> Snapshot:
    await asyncio.sleep(0.01)
    return Snapshot(version=1)


async def test_health_tells_of_the_models_that_a_key_may_use(tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path}/tandem.db")
    store = KeyStore.at(registry.address)
    keys = {
        "lab": store.create("lab", tenant="lab", by="t"),
        "listed": store.create("listed", tenant="lab", models=["shared"], by="t"),
        "admin": store.create("admin", tenant="ops", role=Role.ADMIN, by="t"),
    }
    app = create_app(
        models=[served("shared", None), served("labs", "lab"), served("shops", "shop")],
        watch=never,
        registry=registry,
        require_keys=True,
    )
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as http,
    ):
        told = {}
        for name, key in keys.items():
            answer = await http.get("/health", headers={"x-api-key": key.secret})
            assert answer.status_code == 503
            told[name] = set(answer.json()["ready_replicas"])
        assert told == {"lab": {"shared", "labs"}, "listed": {"shared"}, "admin": {"shared", "labs", "shops"}}


async def test_health_without_a_key_looks_at_the_replicas_once_a_second(tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path}/tandem.db")
    app = create_app(models=[served("shared", None)], watch=never, registry=registry, require_keys=True)
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as http,
    ):
        fleet, looks = app.state.fleet, 0
        ready = fleet.ready

        def counted(pool: str, *, suspects: bool) -> object:
            nonlocal looks
            looks += 1
            return ready(pool, suspects=suspects)

        fleet.ready = counted
        answers = [await http.get("/health") for _ in range(50)]
        assert {each.status_code for each in answers} == {503} and answers[0].json() == {"status": "unavailable"}
        # One second passes at most a few times, however slow the machine is.
        assert 1 <= looks < 25
