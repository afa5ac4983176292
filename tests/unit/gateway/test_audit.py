"""Audit log of a gateway: admin writes with before and after, refused credentials counted, a flood bounded, no secrets."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from gateway_world import BODY, World, echo, world
from small_folders import small_adapter

from tandem.auth import KeyStore
from tandem.auth.audit_log import AuditEntry, AuditLog
from tandem.db.audit import Change
from tandem.errors import RegistryUnreachableError
from tandem.gateway.identity import audit_writer
from tandem.jobs.adapter_entries import without_credentials
from tandem.tasks import stop

__all__ = ["world"]
ADMIN = {"Authorization": "Bearer secret"}


def log(world: World, action: str | None = None) -> list[AuditEntry]:
    return AuditLog.at(world.registry.address).page(limit=1000, action=action)[::-1]


async def flushed(world: World) -> list[AuditEntry]:
    await world.app.state.identity.audit.flush(final=True)
    return log(world, "credentials")


async def closed(world: World, **options: Any) -> str:
    """Make the app's first key, and return its secret when the gateway knows it."""
    secret = KeyStore.at(world.registry.address).create("ann", by="ann@host", **options).secret
    deadline = time.monotonic() + 60
    while (await world.http.post("/v1/completions", json=BODY)).status_code != 401:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    await flushed(world)
    return secret


def state(side: Any) -> tuple[Any, ...]:
    return side["versions"], side["promoted"], side["pinned"]


async def test_each_change_of_an_adapter_has_an_entry_with_before_and_after(world: World) -> None:
    for rank in (4, 8):
        source = small_adapter(world.folder / f"red-{rank}", f"red-{rank}", rank=rank)
        body = {"name": "red", "source": str(source), "base": "base"}
        assert (await world.http.post("/admin/adapters", json=body, headers=ADMIN)).status_code == 201
    for path in ("red@1/promote", "red/roll-back", "red/pin", "red/unpin"):
        assert (await world.http.post(f"/admin/adapters/{path}", headers=ADMIN)).status_code == 200
    assert (await world.http.delete("/admin/adapters/red@2", headers=ADMIN)).status_code == 200
    entries = log(world)
    assert {(entry.by, entry.address) for entry in entries} == {("admin-token", "127.0.0.1")}
    states = [(entry.action, entry.target, state(entry.before), state(entry.after)) for entry in entries]
    assert states == [
        ("adapters.register", "red", (0, None, []), (1, "red@1", [])),
        ("adapters.register", "red", (1, "red@1", []), (2, "red@2", [])),
        ("adapters.promote", "red@1", (2, "red@2", []), (2, "red@1", [])),
        ("adapters.roll_back", "red", (2, "red@1", []), (2, "red@2", [])),
        ("adapters.pin", "red", (2, "red@2", []), (2, "red@2", ["red"])),
        ("adapters.unpin", "red", (2, "red@2", ["red"]), (2, "red@2", [])),
        ("adapters.delete", "red@2", (2, "red@2", []), (1, "red@1", [])),
    ]
    assert entries[0].after and entries[0].after["id"] == "red@1" and entries[0].after["digest"]
    assert entries[-1].after and entries[-1].after["deleted"] == ["red@2"]


async def test_a_change_that_is_refused_has_no_entry(world: World) -> None:
    assert (await world.http.post("/admin/adapters/none/promote", headers=ADMIN)).status_code == 400
    assert (await world.http.post("/admin/adapters/none/pin", headers=ADMIN)).status_code == 404
    assert log(world) == []


async def test_refused_credentials_are_counted_by_address_route_and_reason(world: World) -> None:
    secret = await closed(world)
    # Nothing is written in between, which would split the counts.
    await stop(world.app.state.identity.audit._task)
    already = len(log(world, "credentials"))
    for _ in range(3):
        await world.http.post("/v1/completions", json=BODY, headers={"x-api-key": "tdm-wrong-and-long-enough"})
    await world.http.get("/v1/models")
    await world.http.get("/admin/adapters", headers={"x-api-key": secret})
    entries = (await flushed(world))[already:]
    found = {
        (e.target, e.after["status"], e.after["count"], e.after.get("hint"), bool(e.by)) for e in entries if e.after
    }
    assert found == {
        ("POST /v1/completions", 401, 3, "tdm-wron", False),
        ("GET /v1/models", 401, 1, None, False),
        ("GET /admin/adapters", 403, 1, secret[:8], True),
    }
    assert {entry.address for entry in entries} == {"127.0.0.1"}


async def test_no_entry_has_a_secret_wherever_a_client_puts_it(world: World) -> None:
    secret = await closed(world)
    token = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.c2lnbmF0dXJl"
    for headers in (
        {"x-api-key": token},
        {"Authorization": f"Bearer {secret[:-1]}"},
        {"x-api-key": "sk-ant-0123456789"},
    ):
        for path in ("/v1/models", f"/v1/models/{secret}", f"/{token}", f"/admin/keys/{secret}?key={secret}"):
            await world.http.request("GET", path, headers=headers)
    entries = await flushed(world)
    text = json.dumps([entry.to_json() for entry in entries])
    assert len(entries) > 3 and secret[:9] not in text
    assert "eyJ" not in text and "sk-ant" not in text
    assert {"GET /v1/models/*", "GET /*", "GET /admin/keys/*"} <= {entry.target for entry in entries}


async def test_health_checks_without_a_key_are_not_refusals_and_wrong_keys_there_are(world: World) -> None:
    await world.add_engine(echo())
    await closed(world)
    already = len(log(world, "credentials"))
    assert (await world.http.get("/health")).status_code == 200
    assert len(await flushed(world)) == already
    assert (await world.http.get("/health", headers={"x-api-key": "tdm-wrong"})).status_code == 200
    (entry,) = (await flushed(world))[already:]
    assert entry.target == "GET /health"


async def test_a_flood_of_refused_requests_is_few_rows(world: World) -> None:
    await world.add_engine(echo())
    await closed(world)
    already = len(log(world, "credentials"))
    for _ in range(10):
        await asyncio.gather(
            *(world.http.get("/v1/models", headers={"x-api-key": f"guess-{number}"}) for number in range(30))
        )
    entries = (await flushed(world))[already:]
    # A flush in between may have split the count.
    assert 1 <= len(entries) <= 3
    assert sum(entry.after["count"] for entry in entries if entry.after) == 300


async def test_refusals_are_written_in_the_background_and_at_shutdown(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await closed(world)
    before, writer = len(log(world, "credentials")), world.app.state.identity.audit
    monkeypatch.setattr(audit_writer, "FLUSH_S", 0.05)
    writer._task.cancel()
    writer.start()
    await world.http.get("/v1/models", headers={"x-api-key": "tdm-background"})
    deadline = time.monotonic() + 60
    while len(log(world, "credentials")) == before:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    monkeypatch.setattr(audit_writer, "FLUSH_S", 60.0)
    await asyncio.sleep(0.1)
    await world.http.get("/v1/models", headers={"x-api-key": "tdm-shutdown"})
    await writer.stop()
    assert len(log(world, "credentials")) == before + 2


async def test_while_the_database_is_away_changes_wait_within_bounds_and_follow(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_writer, "MAX_UNWRITTEN", 3)
    writer, away = world.app.state.identity.audit, True
    append = writer.log.append

    def fail(changes: list[Change]) -> None:
        if away:
            raise RegistryUnreachableError("It is away.")
        append(changes)

    writer.log.append = fail
    await closed_app_requests(world)
    for number in range(5):
        await asyncio.to_thread(writer.record, Change(by="key_1", action="adapters.pin", target=str(number)))
    await writer.flush(final=True)
    assert len(writer._unwritten) == 3 and log(world) == []
    away = False
    await writer.flush(final=True)
    assert [entry.target for entry in log(world, "adapters")] == ["0", "1", "2"]
    (others,) = log(world, "credentials")
    assert others.after and others.target == "others" and others.after["count"] == 2


async def closed_app_requests(world: World) -> None:
    """Two requests for admin routes with a wrong token."""
    for _ in range(2):
        await world.http.get("/admin/adapters", headers={"Authorization": "Bearer wrong"})


async def test_the_log_is_read_in_pages_by_admins(world: World) -> None:
    for number in range(3):
        await world.http.post("/admin/keys", json={"name": f"key {number}"}, headers=ADMIN)
    page = (await world.http.get("/admin/audit?limit=2", headers=ADMIN)).json()
    assert [entry["after"]["name"] for entry in page["data"]] == ["key 2", "key 1"] and page["has_more"]
    rest = (await world.http.get(f"/admin/audit?limit=2&after={page['last_id']}", headers=ADMIN)).json()
    assert [entry["after"]["name"] for entry in rest["data"]] == ["key 0"] and not rest["has_more"]
    for query, number in (
        ("action=keys", 3), ("action=adapters", 0), ("by=admin-token", 3), ("by=key_1", 0),
        ("since=2020-01-01T00:00:00", 3), ("since=2999-01-01T00:00:00Z", 0),
    ):  # fmt: skip
        assert len((await world.http.get(f"/admin/audit?{query}", headers=ADMIN)).json()["data"]) == number, query
    assert (await world.http.get("/admin/audit?since=soon", headers=ADMIN)).status_code == 400
    for path in ("/admin/audit?since=0001-01-01T00:00:00%2B14:00", "/admin/usage?until=9999-12-31T23:59:59-14:00"):
        refused = await world.http.get(path, headers=ADMIN)
        assert refused.status_code == 400 and refused.json()["error"]["param"] in ("since", "until"), refused.text
    assert (await world.http.get("/admin/audit")).status_code in (401, 403)
    assert (await world.http.delete("/admin/audit", headers=ADMIN)).status_code == 405


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        ("/models/red", "/models/red"),
        ("s3://bucket/red", "s3://bucket/red"),
        ("s3://id:secret@bucket/red?token=x#y", "s3://bucket/red"),
    ],
)
def test_the_source_of_an_adapter_is_kept_without_credentials(source: str, kept: str) -> None:
    assert without_credentials(source) == kept
