"""`/admin/keys`: keys made, listed, rotated and revoked over HTTP, by admins, with who and where in the audit log."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from gateway_world import BODY, World, echo, world
from sqlalchemy import select

from tandem.auth import KeyStore, Role
from tandem.db.schema import AuditRow
from tandem.errors import RegistryUnreachableError

__all__ = ["world"]
ADMIN = {"Authorization": "Bearer secret"}


async def create(world: World, **body: Any) -> dict[str, Any]:
    answer = await world.http.post("/admin/keys", json={"name": "ann", **body}, headers=ADMIN)
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def until(world: World, secret: str, expected: int) -> None:
    deadline = time.monotonic() + 60
    headers = {"x-api-key": secret}
    while (await world.http.post("/v1/completions", json=BODY, headers=headers)).status_code != expected:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


def audited(world: World) -> list[AuditRow]:
    with KeyStore.at(world.registry.address)._reading() as session:
        return list(session.scalars(select(AuditRow).order_by(AuditRow.id)))


async def test_a_key_is_made_used_rotated_and_revoked_over_http(world: World) -> None:
    await world.add_engine(echo())
    new = await create(world, tenant="lab", models=["base"], limits={"requests_per_minute": 60}, expires_in_s=3600)
    assert new["secret"].startswith(new["hint"]) and new["object"] == "api_key" and new["warnings"] == []
    assert (new["tenant"], new["role"], new["models"]) == ("lab", "user", ["base"])
    assert new["limits"] == {"requests_per_minute": 60} and new["state"] == "active" and new["expires_at"]
    await until(world, new["secret"], 200)

    # Without a body, and with one.
    answer = await world.http.post(f"/admin/keys/{new['id']}/rotate", headers=ADMIN)
    second = answer.json()
    assert answer.status_code == 201 and answer.headers["cache-control"] == "no-store"
    assert second["id"] != new["id"] and second["limits"] == new["limits"]
    await until(world, second["secret"], 200)
    await until(world, new["secret"], 200)
    answer = await world.http.post(f"/admin/keys/{second['id']}/rotate", json={"overlap_s": 0}, headers=ADMIN)
    third = answer.json()
    await until(world, second["secret"], 401)

    answer = await world.http.post(f"/admin/keys/{third['id']}/revoke", headers=ADMIN)
    assert answer.status_code == 200 and answer.json()["state"] == "revoked"
    await until(world, third["secret"], 401)
    assert (await world.http.get(f"/admin/keys/{third['id']}", headers=ADMIN)).json()["state"] == "revoked"


async def test_no_answer_but_that_of_its_making_has_a_secret(world: World) -> None:
    new = await create(world)
    listed = (await world.http.get("/admin/keys", headers=ADMIN)).text
    shown = (await world.http.get(f"/admin/keys/{new['id']}", headers=ADMIN)).text
    assert new["id"] in listed and new["id"] in shown
    for text in (listed, shown, *(str((row.before, row.after)) for row in audited(world))):
        assert new["secret"] not in text and "digest" not in text


async def test_lists_come_in_pages_of_active_keys_or_of_all(world: World) -> None:
    made = [(await create(world, name=f"key {number}", tenant=f"t{number % 2}"))["id"] for number in range(5)]
    await world.http.post(f"/admin/keys/{made[2]}/revoke", headers=ADMIN)

    async def pages(query: str) -> list[list[str]]:
        found, after = [], ""
        while True:
            page = (await world.http.get(f"/admin/keys?limit=2{query}{after}", headers=ADMIN)).json()
            found.append([key["id"] for key in page["data"]])
            if not page["has_more"]:
                assert page["last_id"] is None
                return found
            after = f"&after={page['last_id']}"

    assert await pages("") == [[made[0], made[1]], [made[3], made[4]]]
    assert await pages("&all=true") == [[made[0], made[1]], [made[2], made[3]], [made[4]]]
    assert await pages("&tenant=t1") == [[made[1], made[3]]]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("POST", "/keys", {}, 400, "name"),
        ("POST", "/keys", {"name": "a" * 97}, 400, "name"),
        ("POST", "/keys", {"name": "a\n"}, 400, None),
        ("POST", "/keys", {"name": "a", "role": "root"}, 400, "role"),
        ("POST", "/keys", {"name": "a", "tenant": "No Tenant"}, 400, None),
        ("POST", "/keys", {"name": "a", "expires_in_s": 0}, 400, "expires_in_s"),
        ("POST", "/keys", {"name": "a", "expires_in_s": 10**12}, 400, "expires_in_s"),
        ("POST", "/keys", {"name": "a", "limits": {"requests": 1}}, 400, "limits.requests"),
        ("POST", "/keys", {"name": "a", "limits": {"tokens_per_day": -1}}, 400, "limits.tokens_per_day"),
        ("POST", "/keys", {"name": "a", "models": ["m" * 257]}, 400, None),
        ("POST", "/keys", {"name": "a", "secret": "tdm-mine"}, 400, "secret"),
        ("GET", "/keys?limit=0", None, 400, "limit"),
        ("GET", "/keys?after=key_000000000000", None, 404, "id"),
        ("GET", "/keys/key_000000000000", None, 404, "id"),
        ("GET", "/keys/ann", None, 404, "id"),
        ("POST", "/keys/key_000000000000/revoke", None, 404, "id"),
        ("POST", "/keys/key_000000000000/rotate", {"overlap_s": -1}, 400, "overlap_s"),
        ("DELETE", "/keys/key_000000000000", None, 405, None),
    ],
)
async def test_what_no_key_can_have_is_refused_with_the_field(
    world: World, method: str, path: str, body: Any, status: int, param: str | None
) -> None:
    await create(world)  # a name of a key is no id
    answer = await world.http.request(method, f"/admin{path}", json=body, headers=ADMIN)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param and len(answer.text) < 1200


async def test_an_ended_key_is_not_rotated(world: World) -> None:
    new = await create(world)
    await world.http.post(f"/admin/keys/{new['id']}/revoke", headers=ADMIN)
    answer = await world.http.post(f"/admin/keys/{new['id']}/rotate", headers=ADMIN)
    assert answer.status_code == 400 and "revoked" in answer.json()["error"]["message"]


async def test_keys_of_other_roles_and_of_none_reach_none_of_the_routes(world: World) -> None:
    new = await create(world, role="trainer")
    await until(world, "tdm-wrong", 401)
    for headers, expected in (({"x-api-key": new["secret"]}, 403), ({"x-api-key": "tdm-wrong"}, 401), ({}, 401)):
        for method, path in (
            ("GET", "/keys"), ("POST", "/keys"), ("GET", f"/keys/{new['id']}"), ("POST", f"/keys/{new['id']}/rotate"),
            ("POST", f"/keys/{new['id']}/revoke"),
        ):  # fmt: skip
            answer = await world.http.request(method, f"/admin{path}", json={"name": "mine"}, headers=headers)
            assert answer.status_code == expected, (method, path)
    assert len(KeyStore.at(world.registry.address).list()) == 1


async def test_the_audit_log_says_which_key_did_it_from_where(world: World) -> None:
    first = KeyStore.at(world.registry.address).create("root", role=Role.ADMIN, by="ann@host")
    await until(world, "tdm-wrong", 401)
    headers = {"x-api-key": first.secret, "x-forwarded-for": "203.0.113.9", "x-tandem-client": "wrong 203.0.113.9"}
    new = (await world.http.post("/admin/keys", json={"name": "bob"}, headers=headers)).json()
    await world.http.post(f"/admin/keys/{new['id']}/revoke", headers=headers)
    await create(world)
    rows = [(row.by, row.action, row.target, row.address) for row in audited(world)]
    assert rows[1:3] == [
        (first.key.id, "keys.create", new["id"], "127.0.0.1"),
        (first.key.id, "keys.revoke", new["id"], "127.0.0.1"),
    ]
    assert rows[3][:2] == ("admin-token", "keys.create")


async def test_a_name_that_is_neither_registered_nor_served_is_a_warning_with_the_nearest(world: World) -> None:
    world.adapter("support-bot")
    new = await create(world, models=["suport-bot", "support-bot", "support-bot@1", "base", "base@1", "base@7"])
    assert [text.partition(" is registered")[0] for text in new["warnings"]] == [
        "No model or adapter 'suport-bot'",
        "No model or adapter 'base@7'",
    ]
    assert "'support-bot'" in new["warnings"][0]


async def test_no_key_is_made_whose_secret_nobody_would_see(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*args: object) -> None:
        raise RegistryUnreachableError("It is away.")

    monkeypatch.setattr("tandem.registry.store.Registry.versions", away)
    answer = await world.http.post("/admin/keys", json={"name": "ann", "models": ["red"]}, headers=ADMIN)
    assert answer.status_code == 503
    assert KeyStore.at(world.registry.address).list(every=True) == []
