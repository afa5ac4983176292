"""Who may ask what: no route but health answers without a key once there is one, and only admins reach /admin."""

from __future__ import annotations

import asyncio
import base64
import re
import time
from datetime import timedelta

import pytest
from gateway_world import BODY, World, echo, world
from starlette.routing import Mount, Route

from tandem.auth import KeyStore, NewKey, Principal, Role
from tandem.config import ServedModelConfig
from tandem.gateway.errors import ApiError
from tandem.gateway.identity.authentication import PUBLIC_PATHS, Authentication
from tandem.gateway.models.catalog import Catalog
from tandem.routing.records import ServedModel

__all__ = ["world"]
SEEN_S = 5.0
"""Within which a gateway has to know of a new, rotated or revoked key."""


@pytest.fixture
def store(world: World) -> KeyStore:
    return KeyStore.at(world.registry.address)


async def status(world: World, headers: dict[str, str] | None = None, path: str = "/v1/completions") -> int:
    if path == "/v1/completions":
        return (await world.http.post(path, json=BODY, headers=headers)).status_code
    return (await world.http.get(path, headers=headers)).status_code


async def until(world: World, secret: str, expected: int) -> None:
    """Return once the gateway answers a key with a status."""
    deadline = time.monotonic() + SEEN_S
    while await status(world, {"x-api-key": secret}) != expected:
        assert time.monotonic() < deadline, f"no {expected} within {SEEN_S} s"
        await asyncio.sleep(0.1)


@pytest.fixture
async def key(world: World, store: KeyStore) -> NewKey:
    """The first key of an app with one engine; the app knows it."""
    await world.add_engine(echo())
    assert await status(world) == 200  # without a key, as long as there is none
    new = store.create("laptop", tenant="lab", by="ann")
    await until(world, "tdm-wrong", 401)
    return new


async def test_a_key_is_accepted_in_each_of_the_forms_that_clients_send(world: World, key: NewKey) -> None:
    basic = base64.b64encode(f"ann:{key.secret}".encode()).decode()
    for headers in (
        {"Authorization": f"Bearer {key.secret}"},
        {"x-api-key": key.secret},
        {"Authorization": f"Basic {basic}"},
    ):
        assert await status(world, headers) == 200, headers


async def test_who_has_an_expired_key_is_told_so(world: World, key: NewKey, store: KeyStore) -> None:
    brief = store.create("brief", expires_in=timedelta(seconds=3), by="ann")
    await until(world, brief.secret, 200)
    await until(world, brief.secret, 401)
    answer = await world.http.post("/v1/completions", json=BODY, headers={"x-api-key": brief.secret})
    assert "expired at" in answer.json()["error"]["message"] and answer.json()["error"]["code"] == "invalid_api_key"


async def test_without_a_valid_key_requests_are_refused_in_the_shape_of_their_api(world: World, key: NewKey) -> None:
    for headers in ({}, {"x-api-key": "tdm-wrong"}, {"Authorization": f"Bearer {key.secret}x"}):
        answer = await world.http.post("/v1/completions", json=BODY, headers=headers)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        error = answer.json()["error"]
        assert error["type"] == "authentication_error" and error["code"] == "invalid_api_key"
        assert key.secret not in answer.text and "tdm-wrong" not in answer.text
        answer = await world.http.post("/v1/messages", json={}, headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
        assert answer.headers["request-id"]


async def test_a_refused_request_is_answered_before_its_body_is_read(world: World, key: NewKey) -> None:
    url = world.http.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    # Of a body of a gigabyte two bytes come.
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000000\r\n\r\n{ ")
    async with asyncio.timeout(5):
        assert b" 401 " in await reader.readline()
    writer.close()


async def test_a_revoked_key_is_refused_within_seconds(world: World, store: KeyStore, key: NewKey) -> None:
    store.revoke(key.key.id, by="ann")
    await until(world, key.secret, 401)
    # It was the only one: the app does not become open to everybody.
    assert await status(world) == 401


async def test_a_rotated_key_and_its_successor_are_both_accepted(world: World, store: KeyStore, key: NewKey) -> None:
    new = store.rotate(key.key.id, overlap=timedelta(hours=1), by="ann")
    await until(world, new.secret, 200)
    assert await status(world, {"x-api-key": key.secret}) == 200


@pytest.mark.parametrize("role", list(Role))
async def test_only_admins_reach_admin_routes(world: World, store: KeyStore, key: NewKey, role: Role) -> None:
    new = store.create("other", role=role, by="ann")
    await until(world, new.secret, 200)
    answer = await world.http.get("/admin/adapters", headers={"x-api-key": new.secret})
    if role is Role.ADMIN:
        assert answer.status_code == 200
    else:
        assert answer.status_code == 403 and "need the role admin" in answer.json()["error"]["message"]


async def test_no_route_but_health_is_open_without_a_key(world: World, key: NewKey) -> None:
    below = [(mount.path, route) for mount in world.app.routes if isinstance(mount, Mount) for route in mount.routes]
    routes = [*(("", route) for route in world.app.routes), *below]
    paths = {(prefix + r.path, method) for prefix, r in routes if isinstance(r, Route) for method in r.methods or ()}
    assert len(paths) > 25 and ("/admin/adapters", "POST") in paths
    for path, method in sorted(paths):
        answer = await world.http.request(method, re.sub(r"{[^}]*}", "base", path))
        assert (answer.status_code == 401) == (path not in PUBLIC_PATHS), (method, path, answer.status_code)
    for path in (
        "/",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/v1/nothing",
        "/admin",
        "/health/../v1/models",
        "//health",
    ):
        assert (await world.http.get(path)).status_code == 401, path


async def test_a_key_reaches_the_models_that_it_names_and_sees_no_others(
    world: World, store: KeyStore, key: NewKey
) -> None:
    for name in ("red", "blue"):
        world.adapter(name)
    new = store.create("narrow", models=["red"], by="ann")
    await until(world, new.secret, 404)  # known, and not allowed to use `base`
    headers = {"x-api-key": new.secret}
    for model, expected in (
        ("red", 200),
        ("red@1", 200),
        ("base", 404),
        ("base@1", 404),
        ("blue", 404),
        ("nothing", 404),
    ):
        answer = await world.http.post("/v1/completions", json=BODY | {"model": model}, headers=headers)
        assert answer.status_code == expected, model
        if expected == 404:
            assert answer.json()["error"]["code"] == "model_not_found" and "blue" not in answer.text.replace(
                "'blue'", ""
            )
        assert (await status(world, headers, f"/v1/models/{model}")) == expected
    listed = (await world.http.get("/v1/models", headers=headers)).json()["data"]
    assert [card["id"] for card in listed] == ["red"]


@pytest.mark.parametrize(
    ("allowed", "reached"),
    [
        (["chat"], {"chat", "base", "base@1"}),
        (["base"], {"chat", "base", "base@1"}),
        (["base@1"], {"chat", "base", "base@1"}),
        (["red"], {"red", "red@1", "red@2"}),
        (["red@2"], {"red", "red@2"}),
        (["red@1"], {"red@1"}),
        (["base@2"], set()),
    ],
)
async def test_a_list_means_a_model_or_version_by_whichever_of_its_names_a_request_has(
    world: World, allowed: list[str], reached: set[str]
) -> None:
    for rank in (4, 8):
        world.adapter("red", rank=rank)
    model = ServedModel(
        id="base@1", name="chat", path="", max_length=64, config=ServedModelConfig(model="base", engine="vllm")
    )
    catalog = Catalog([model], world.registry)
    principal = Principal(key_id="k", tenant="t", role=Role.USER, models=tuple(allowed))
    found = set()
    for name in ("chat", "base", "base@1", "red", "red@1", "red@2"):
        try:
            await catalog.resolve(name, principal)
            assert (await catalog.card(name, principal)).name == name
            found.add(name)
        except ApiError as error:
            assert error.status == 404 and error.code == "model_not_found"
    assert found == reached
    with pytest.raises(ApiError) as refused:
        await catalog.resolve("red@9", principal)
    assert ("it has" in refused.value.message) == (allowed == ["red"])
    await catalog.stop()


async def test_lists_tell_a_narrow_key_no_other_names_in_any_of_their_pages(
    world: World, store: KeyStore, key: NewKey
) -> None:
    for name in ("alpha", "beta", "zeta"):
        world.adapter(name)
    new = store.create("narrow", models=["zeta", "gone", "base"], by="ann")
    headers = {"x-api-key": new.secret}
    deadline = time.monotonic() + SEEN_S
    while (answer := await world.http.get("/v1/models?limit=1", headers=headers)).status_code != 200:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    seen, pages = [], 0
    while True:
        page, pages = answer.json(), pages + 1
        assert "alpha" not in answer.text and "beta" not in answer.text
        seen += [card["id"] for card in page["data"]]
        if not page["has_more"]:
            break
        answer = await world.http.get(f"/v1/models?limit=1&after={page['last_id']}", headers=headers)
    assert seen == ["base", "zeta"] and pages == 3


async def test_a_long_name_is_refused_before_it_is_looked_up(world: World, store: KeyStore, key: NewKey) -> None:
    new = store.create("narrow", models=["base"], by="ann")
    await until(world, new.secret, 200)
    answer = await world.http.post(
        "/v1/completions", json=BODY | {"model": "m" * 3000}, headers={"x-api-key": new.secret}
    )
    assert answer.status_code == 400 and "characters" in answer.json()["error"]["message"]


async def test_without_keys_only_requests_to_this_machine_are_answered(world: World) -> None:
    await world.add_engine(echo())
    for headers, expected in (
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "rebound.example"}, 403),
        ({"host": "127.0.0.1.example"}, 403),
        ({"x-forwarded-for": "10.0.0.1"}, 403),
    ):
        assert await status(world, headers) == expected, headers


async def test_a_gateway_that_has_not_read_the_keys_answers_503(world: World) -> None:
    await world.add_engine(echo())
    world.app.state.identity.keys.loaded = False
    answer = await world.http.post("/v1/completions", json=BODY)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "keys_unavailable"
    assert (await world.http.get("/health/live")).status_code == 200


@pytest.mark.parametrize(
    "path", ["/%61dmin/adapters", "//admin/adapters", "/admin/", "/Admin/adapters", "/v1/../admin/adapters"]
)
async def test_no_spelling_of_a_path_opens_the_admin_routes(
    world: World, store: KeyStore, key: NewKey, path: str
) -> None:
    await until(world, key.secret, 200)
    reader, writer = await asyncio.open_connection(world.http.base_url.host, world.http.base_url.port)
    writer.write(
        f"GET {path} HTTP/1.1\r\nhost: localhost\r\nx-api-key: {key.secret}\r\nconnection: close\r\n\r\n".encode()
    )
    answer = await reader.read()
    assert answer.split()[1] in (b"403", b"404"), answer
    writer.close()


async def test_a_websocket_is_closed() -> None:
    sent: list[object] = []

    async def send(message: object) -> None:
        sent.append(message)

    guarded = Authentication(None, None, required=True, admin=None)  # type: ignore[arg-type] # neither is reached
    await guarded({"type": "websocket", "path": "/ws", "headers": []}, None, send)  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_health_says_no_more_than_the_status_without_a_key(world: World, key: NewKey) -> None:
    for path in PUBLIC_PATHS:
        answer = await world.http.get(path)
        assert answer.status_code == 200 and answer.json() == {"status": "ok"}, path
    await until(world, key.secret, 200)
    answer = await world.http.get("/health", headers={"x-api-key": key.secret})
    assert answer.json() == {"status": "ok", "ready_replicas": {"base": 1}}
