"""Management routes on FastAPI: the check comes first, bodies are bounded, errors have the gateway's shape."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from gateway_world import World
from gateway_world import world as world
from starlette.routing import Mount

from tandem.gateway.app import create_app
from tandem.gateway.routes import management
from tandem.gateway.routes.admin import MAX_REGISTRATIONS
from tandem.gateway.routes.management import MAX_BODY_BYTES
from tandem.registry import Registry

ADMIN = {"Authorization": "Bearer secret"}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("POST", "/adapters", b"{bad", 400, None),
        ("POST", "/adapters", b"", 400, None),
        ("POST", "/adapters", b"[]", 400, None),
        ("POST", "/adapters", b'{"name": "", "source": "x"}', 400, "name"),
        ("POST", "/adapters", b'{"name": "a", "source": "x", "promote": "yes"}', 400, "promote"),
        ("POST", "/adapters", b'{"name": "a", "source": "x", "rank": 8}', 400, "rank"),
        ("POST", "/adapters", b" " * (MAX_BODY_BYTES + 1), 413, None),
        ("GET", "/adapters?limit=0", b"", 400, "limit"),
        ("GET", "/adapters?limit=1001", b"", 400, "limit"),
        ("GET", "/adapters?limit=x", b"", 400, "limit"),
        ("GET", "/adapters?all=maybe", b"", 400, "all"),
        ("GET", "/adapters/none", b"", 404, "name"),
        ("GET", "/adapters/", b"", 404, None),
        ("GET", "/nothing", b"", 404, None),
        ("PUT", "/adapters", b"", 405, None),
    ],
)
async def test_every_error_has_the_shape_of_the_other_routes(
    world: World, method: str, path: str, body: bytes, status: int, param: str | None
) -> None:
    headers = {**ADMIN, "x-request-id": "mine"}
    answer = await world.http.request(method, f"/admin{path}", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(answer.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param) and error["message"].endswith(".")
    assert answer.headers["x-request-id"] == "mine"


async def test_a_compressed_body_and_one_of_another_content_type_are_415(world: World) -> None:
    packed = await world.http.post("/admin/adapters", content=b"{}", headers={**ADMIN, "Content-Encoding": "gzip"})
    assert packed.status_code == 415
    # As curl sends what `--data` gives.
    headers = {**ADMIN, "Content-Type": "application/x-www-form-urlencoded"}
    body = json.dumps({"name": "red", "source": "/no/such", "base": "base"})
    answer = await world.http.post("/admin/adapters", content=body, headers=headers)
    assert answer.status_code == 415 and "application/json" in answer.text


@pytest.mark.parametrize("body", [b"{bad", b" " * (MAX_BODY_BYTES + 1), b'{"name": 3}'])
async def test_nothing_of_a_request_is_read_before_its_token(world: World, body: bytes) -> None:
    answer = await world.http.post("/admin/adapters", content=body, headers={"Authorization": "Bearer wrong"})
    assert answer.status_code == 401


async def test_an_unexpected_error_is_500_in_the_same_shape(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("tandem.jobs.adapters.Adapters.list", fail)
    answer = await world.http.get("/admin/adapters", headers=ADMIN)
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "broken" not in answer.text


async def test_an_adapter_is_listed_with_the_fields_it_always_had(world: World) -> None:
    world.adapter("red")
    (listed,) = (await world.http.get("/admin/adapters", headers=ADMIN)).json()["data"]
    fields = ["id", "object", "name", "version", "base", "rank", "source", "digest", "lineage", "created_at"]
    assert list(listed) == [*fields, "tenant", "promoted", "pinned"]
    assert (listed["object"], listed["created_at"][-6:]) == ("adapter", "+00:00")


def test_the_openapi_document_has_every_route_with_its_models_and_errors(tmp_path: Path) -> None:
    app = create_app(models=[], watch=None, registry=Registry(f"sqlite:///{tmp_path}/tandem.db"))  # type: ignore[arg-type]
    (mounted,) = (route for route in app.routes if isinstance(route, Mount))
    document: dict[str, Any] = mounted.app.openapi()  # type: ignore[attr-defined]
    assert document["servers"] == [{"url": "/admin"}]
    operations = {
        (method, path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    one = "/adapters/{name}"
    assert set(operations) == {
        *((method, path) for method in ("get", "post") for path in ("/adapters",)),
        *((method, one) for method in ("get", "delete")),
        *(("post", f"{one}/{verb}") for verb in ("promote", "roll-back", "pin", "unpin")),
        ("get", "/residency"),
        ("get", "/audit"),
        ("get", "/usage"),
        ("get", "/tenants"),
        ("put", "/tenants/{tenant}/limits"),
        *((method, "/keys") for method in ("get", "post")),
        ("get", "/keys/{id}"),
        *(("post", f"/keys/{{id}}/{verb}") for verb in ("rotate", "revoke")),
    }
    for operation in operations.values():
        assert {"4XX", "5XX"} < set(operation["responses"]) and "422" not in operation["responses"]
    register = operations["post", "/adapters"]
    assert "201" in register["responses"]
    assert register["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/AdapterRegistration")


async def test_registrations_that_hang_end_with_504_and_leave_other_changes_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.adapter("red")
    world.adapter("red", rank=4)
    released, begun = threading.Event(), []

    def hang(*args: object, **options: object) -> None:
        begun.append(1)
        released.wait(60)

    monkeypatch.setattr("tandem.jobs.adapters.Adapters.register", hang)
    body = {"name": "blue", "source": "/nowhere", "base": "base"}
    try:
        asked = [
            asyncio.create_task(world.http.post("/admin/adapters", json=body, headers=ADMIN, timeout=60))
            for _ in range(MAX_REGISTRATIONS + 40)
        ]
        async with asyncio.timeout(20):
            while len(begun) < MAX_REGISTRATIONS:
                await asyncio.sleep(0.01)
        assert (await world.http.post("/admin/adapters/red@1/promote", headers=ADMIN)).json()["id"] == "red@1"
        monkeypatch.setattr(management, "WORK_TIMEOUT_S", 0.1)
        answer = await world.http.post("/admin/adapters", json=body, headers=ADMIN)
        assert answer.status_code == 504 and "Look at its result" in answer.json()["error"]["message"]
        assert len(begun) == MAX_REGISTRATIONS
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        released.set()
