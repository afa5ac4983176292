"""A gateway behind HAProxy with TLS: the audit log has its clients' addresses, streams and admin routes work over HTTP/2."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from certificates import make_pair
from gateway_world import World, echo, running
from haproxy_listener import Listener, curl, listening

from tandem.auth import KeyStore, Role
from tandem.auth.audit_log import AuditLog
from tandem.cluster.haproxy import CLIENT_HEADER, SECRET_NAME
from tandem.cluster.tls import install

CLIENT = "127.0.0.7"
"""All of 127.0.0.0/8 is this machine's: an address of a client's own."""
FORGED = ("-H", "X-Forwarded-For: 203.0.113.9", "-H", f"{CLIENT_HEADER}: forged 203.0.113.9")


@pytest.fixture
async def listener(tmp_path: Path) -> AsyncIterator[Listener]:
    with listening(tmp_path, health="/health/live") as made:
        install(made.folder, make_pair(tmp_path, "first"))
        yield made


@pytest.fixture
async def world(listener: Listener, tmp_path: Path) -> AsyncIterator[World]:
    folder = tmp_path / "world"
    folder.mkdir()
    secret = (listener.folder / SECRET_NAME).read_text()
    async with running(folder, proxy_secret=secret) as made:
        await made.add_engine(echo())
        listener.backend = made.http.base_url.port or 0
        listener.start()
        await listener.subject()
        yield made


async def test_addresses_are_those_of_clients_and_not_what_they_claim(world: World, listener: Listener) -> None:
    key = KeyStore.at(world.registry.address).create("root", role=Role.ADMIN, by="ann@host")
    async with asyncio.timeout(20):
        while (await curl(listener, "/v1/models", "--interface", CLIENT))[1] != "2 401":
            await asyncio.sleep(0.1)
    _, told = await curl(listener, "/v1/models", "--interface", CLIENT, "-H", "x-api-key: tdm-wrong", *FORGED)
    assert told == "2 401"
    body, told = await curl(
        listener, "/admin/keys", "--interface", CLIENT, "-H", f"x-api-key: {key.secret}", *FORGED,
        "-H", "content-type: application/json", "-d", '{"name": "bob"}',
    )  # fmt: skip
    assert told == "2 201"
    # Past HAProxy the header is no more than a claim.
    await world.http.get("/v1/models", headers={CLIENT_HEADER: "forged 203.0.113.9", "x-api-key": "tdm-direct"})
    await world.app.state.identity.audit.flush(final=True)
    entries = AuditLog.at(world.registry.address).page()
    addresses = {(entry.after or {}).get("hint"): entry.address for entry in entries}
    assert addresses["tdm-wron"] == CLIENT and addresses["tdm-dire"] == "127.0.0.1"
    assert {e.address for e in entries if e.target == json.loads(body)["id"]} == {CLIENT}
    assert "203.0.113.9" not in str(entries)


async def test_a_stream_comes_whole_over_http_2(world: World, listener: Listener) -> None:
    request = json.dumps({"model": "base", "prompt": "word " * 40, "max_tokens": 40, "stream": True})
    body, told = await curl(listener, "/v1/completions", "-N", "-H", "content-type: application/json", "-d", request)
    assert told == "2 200" and body.count("data: ") > 40 and body.rstrip().endswith("data: [DONE]")
