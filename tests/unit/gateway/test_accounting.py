"""Limits, usage and the access log at a gateway in front of echo engines."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from gateway_world import BODY, Reflecting, World, echo, world

from tandem.auth import KeyStore, Limits, NewKey
from tandem.gateway.replicas import loss
from tandem.registry import Registry
from tandem.routing.records import ReplicaRecord
from tandem.usage import UsageCounts, UsageKey, UsageLabels, UsageStore, UsageWriter

__all__ = ["world"]
JSON = {"content-type": "application/json"}


async def until(condition: Any, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def with_key(world: World, limits: Limits | None = None, tenant: str = "lab") -> NewKey:
    """A key that the gateway knows; requests of `world.http` have it from then on."""
    new = KeyStore.at(world.registry.address).create("ann", tenant=tenant, limits=limits, by="test")
    deadline = time.monotonic() + 60
    while (await world.http.get("/v1/models")).status_code != 401:  # as before the first key
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    world.http.headers["authorization"] = f"Bearer {new.secret}"
    return new


async def limit_tenant(world: World, tenant: str, limits: Limits) -> None:
    KeyStore.at(world.registry.address).limit_tenant(tenant, limits, by="test")
    await until(lambda: world.app.state.identity.keys.tenant_limits(tenant) == limits)


async def test_a_request_is_charged_to_its_key_tenant_model_adapter_and_route(world: World):
    await world.add_engine(echo())
    world.adapter("red")
    new = await with_key(world)
    red = {"model": "red", "messages": [{"role": "user", "content": "one two"}]}
    assert (await world.http.post("/v1/completions", json=BODY)).status_code == 200
    assert (await world.http.post("/v1/chat/completions", json=red)).status_code == 200
    await until(lambda: len(world.usage) == 2)
    assert world.usage == [
        (UsageLabels(new.key.id, "lab", "base@1", "", "/v1/completions"), UsageCounts(1, 3, 3)),
        (UsageLabels(new.key.id, "lab", "base@1", "red@1", "/v1/chat/completions"), UsageCounts(1, 2, 2)),
    ]


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}])
async def test_a_stream_is_counted_and_its_client_sees_nothing_of_that(world: World, options: dict[str, Any]):
    await world.add_engine(echo())
    answer = await world.http.post("/v1/completions", json={**BODY, "stream": True, **options})
    # The client has its last byte before the replica has ended the request.
    await until(lambda: world.usage)
    assert world.usage[0][1] == UsageCounts(1, 3, 3)
    assert answer.text.endswith("data: [DONE]\n\n") and "tandem" not in answer.text
    assert ('"usage"' in answer.text) == bool(options)
    whole = await world.http.post("/v1/completions", json=BODY)
    assert "x-tandem-usage" not in whole.headers


async def test_a_stream_that_its_client_leaves_is_charged_what_was_generated(world: World):
    await world.add_engine(echo(delay_s=0.02))
    body = {**BODY, "stream": True, "ignore_eos": True, "max_tokens": 1000}
    async with world.http.stream("POST", "/v1/completions", json=body) as answer:
        events = aiter(answer.aiter_bytes())
        for _ in range(5):
            await anext(events)
    await until(lambda: world.usage)
    counts = world.usage[0][1]
    assert counts.requests == 1 and counts.prompt_tokens == 3 and 5 <= counts.completion_tokens < 900


async def test_an_answer_that_its_client_does_not_wait_for_is_charged_too(world: World):
    engine = echo(delay_s=0.02)
    await world.add_engine(engine)
    body = {**BODY, "ignore_eos": True, "max_tokens": 1000}
    asked = asyncio.create_task(world.http.post("/v1/completions", json=body))
    await until(lambda: engine.stats().running)
    await asyncio.sleep(0.5)
    asked.cancel()
    await until(lambda: world.usage)
    assert 1 <= world.usage[0][1].completion_tokens < 900


async def test_a_refused_request_is_charged_nothing(world: World):
    await world.add_engine(echo(max_length=3))
    long = {**BODY, "prompt": "one two three four"}
    assert (await world.http.post("/v1/completions", json=long)).status_code == 400
    assert (await world.http.post("/v1/completions", json={**BODY, "model": "nobody"})).status_code == 404
    assert world.usage == []


@asynccontextmanager
async def breaking_replica(world: World) -> AsyncIterator[None]:
    """A replica that is killed after two events of its first answer."""
    server: asyncio.Server

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(2):
            writer.write(b'13\r\ndata: {"choices":\n\n\r\n')
            await writer.drain()
        await asyncio.sleep(0.1)
        server.close()
        writer.transport.abort()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    world.records["r9"] = ReplicaRecord(id="r9", pool="base@1", url=f"http://{host}:{port}", token="t")
    world.version += 1
    await asyncio.sleep(0.1)
    yield
    server.close()


async def test_a_request_whose_replica_is_killed_is_charged_what_arrived_as_an_estimate(world: World):
    async with breaking_replica(world):
        answer = await world.http.post("/v1/completions", json={**BODY, "stream": True})
        assert "stopped in the middle" in answer.text
    # The directory has not heard it for 10 s.
    world.records["r9"] = replace(world.records["r9"], state="silent")
    world.version += 1
    store = UsageStore.at(world.registry.address)
    await until(lambda: store.sums(("model",)))
    (row,) = store.sums(("model",))
    assert (row["requests"], row["estimated_requests"], row["completion_tokens"]) == (1, 1, 2)
    assert row["prompt_tokens"] > 0


async def test_a_request_whose_replica_this_gateway_alone_cannot_reach_is_charged_by_that_replica_only(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loss, "LOST_WITHIN_S", 1.0)
    charged: list[UsageCounts] = []
    monkeypatch.setattr(UsageWriter, "add", lambda self, labels, counts: charged.append(counts))
    async with breaking_replica(world):
        answer = await world.http.post("/v1/completions", json={**BODY, "stream": True})
        assert "stopped in the middle" in answer.text
    # The directory goes on to call it ready.
    await until(lambda: not world.app.state.relay._probes)
    assert charged == []


async def test_requests_over_a_keys_limit_are_429_with_the_headers_that_sdks_read(world: World):
    await world.add_engine(Reflecting(("base@1", "base")))
    await with_key(world, Limits(requests_per_minute=2, tokens_per_minute=5000))
    first = await world.http.post("/v1/completions", json=BODY)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-reset-requests"].endswith("s")
    assert int(first.headers["x-ratelimit-remaining-tokens"]) < 5000
    messages = {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    second = await world.http.post("/v1/messages", json=messages)
    assert second.headers["anthropic-ratelimit-requests-remaining"] == "0"
    assert second.headers["anthropic-ratelimit-requests-reset"].endswith("Z")
    third = await world.http.post("/v1/completions", json=BODY)
    assert third.status_code == 429 and 50 <= int(third.headers["retry-after"]) <= 61
    error = third.json()["error"]
    assert error["code"] == "rate_limit_exceeded" and "2 requests in a minute" in error["message"]
    await until(lambda: len(world.usage) == 2)


async def test_wrong_requests_count_as_requests_and_one_too_many_is_refused_before_its_body_is_read(world: World):
    await world.add_engine(echo())
    await with_key(world, Limits(requests_per_minute=3))
    unknown = {**BODY, "model": "nobody"}
    assert (await world.http.post("/v1/completions", json=unknown)).status_code == 404
    assert (await world.http.post("/v1/completions", content="{", headers=JSON)).status_code == 400
    assert (await world.http.post("/v1/completions", json={**BODY, "n": -1})).status_code == 400
    assert (await world.http.post("/v1/completions", json=unknown)).status_code == 429

    url = httpx.URL(str(world.http.base_url))
    reader, writer = await asyncio.open_connection(url.host, url.port)
    key = world.http.headers["authorization"]
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: {key}\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: 1000\r\n\r\n".encode())
    async with asyncio.timeout(10):
        answered = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    writer.close()
    assert answered.startswith("http/1.1 429 ") and "\r\nretry-after: " in answered


async def test_a_name_that_is_not_registered_is_looked_up_once_until_the_registry_changes(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    await world.add_engine(echo())
    resolved: list[str] = []
    resolve = Registry.resolve

    def counted(self: Registry, name: str, **options: Any) -> Any:
        resolved.append(name)
        return resolve(self, name, **options)

    monkeypatch.setattr(Registry, "resolve", counted)
    for _ in range(3):
        assert (await world.http.post("/v1/completions", json={**BODY, "model": "red"})).status_code == 404
    assert resolved == ["red"]
    world.adapter("red")
    assert (await world.http.post("/v1/completions", json={**BODY, "model": "red"})).status_code == 200


async def test_tokens_that_were_reserved_and_not_used_are_free_again(world: World):
    await world.add_engine(echo())
    await with_key(world, Limits(tokens_per_minute=100))
    for _ in range(4):  # each reserves 60 and more, and uses 6
        answer = await world.http.post("/v1/completions", json={**BODY, "max_tokens": 40})
        assert answer.status_code == 200
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) <= 100 - 3 * 6 - 40
    too_many = await world.http.post("/v1/completions", json={**BODY, "max_tokens": 60, "n": 2})
    assert too_many.status_code == 429 and too_many.headers["x-should-retry"] == "false"


async def test_a_request_that_no_engine_got_is_charged_no_tokens(world: World):
    await with_key(world, Limits(tokens_per_minute=200))
    for _ in range(3):  # each reserves more than 100
        refused = await world.http.post("/v1/completions", json={**BODY, "max_tokens": 60, "n": 2})
        assert refused.status_code == 503
    await world.add_engine(echo())
    answer = await world.http.post("/v1/completions", json={**BODY, "max_tokens": 60, "n": 2})
    assert answer.status_code == 200
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) > 0


async def test_a_tenants_limit_is_shared_by_its_keys_and_counts_requests_at_once(world: World):
    await world.add_engine(echo(delay_s=0.05))
    await with_key(world)
    await limit_tenant(world, "lab", Limits(concurrent_requests=1))
    running = asyncio.create_task(world.http.post("/v1/completions", json={**BODY, "prompt": "one " * 20}))
    await until(lambda: world.engines[0].stats().running)
    refused = await world.http.post("/v1/completions", json=BODY)
    assert refused.status_code == 429 and "tenant lab" in refused.json()["error"]["message"]
    assert (await running).status_code == 200
    assert (await world.http.post("/v1/completions", json=BODY)).status_code == 200


async def test_a_budget_of_a_day_counts_what_other_processes_have_written(world: World):
    await world.add_engine(echo())
    new = await with_key(world, Limits(tokens_per_day=200))
    assert (await world.http.post("/v1/completions", json={**BODY, "max_tokens": 4})).status_code == 200
    store = UsageStore.at(world.registry.address)
    labels = UsageLabels(new.key.id, "lab", "base@1", "", "/v1/completions")
    store.add("another", 1, {UsageKey.at(labels, time.time()): UsageCounts(1, 100, 95)})
    deadline = time.monotonic() + 15
    while (answer := await world.http.post("/v1/completions", json={**BODY, "max_tokens": 4})).status_code != 429:
        assert time.monotonic() < deadline and answer.status_code == 200
        await asyncio.sleep(0.5)
    error = answer.json()["error"]
    assert error["code"] == "insufficient_quota" and "200 tokens in a day" in error["message"]
    assert answer.headers["x-should-retry"] == "false"


async def test_each_request_has_a_line_in_the_access_log_and_nothing_of_its_content(world: World):
    await world.add_engine(echo())
    new = await with_key(world)
    secret = {"model": "base", "prompt": "zebra zebra", "stream": True}
    await world.http.post("/v1/completions", json=secret, headers={"x-request-id": "mine"})
    await world.http.post("/v1/completions", json=secret, headers={"authorization": "Bearer tdm-wrong"})
    await world.http.get("/health/live")
    log = world.folder / "logs" / "access.jsonl"
    await until(lambda: log.exists() and "/v1/completions" in log.read_text() and '"refused"' in log.read_text())
    assert log.stat().st_mode & 0o777 == 0o600
    assert "zebra" not in log.read_text() and "tdm-" not in log.read_text() and "health" not in log.read_text()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (answered,) = [line for line in lines if "completions" in line.get("path", "")]
    assert (answered["request_id"], answered["key_id"], answered["tenant"]) == ("mine", new.key.id, "lab")
    assert (answered["status"], answered["model"], answered["replica"]) == (200, "base@1", "r0")
    assert (answered["prompt_tokens"], answered["completion_tokens"]) == (2, 2)
    assert 0 < answered["head_s"] <= answered["total_s"]
    # Those of `with_key` too, perhaps.
    assert sum(line["requests"] for line in lines if line.get("event") == "refused") >= 1


async def test_a_path_with_a_secret_is_masked_in_the_access_log(world: World):
    await with_key(world)
    await world.http.get("/v1/models/tdm-0123456789")
    await world.http.get("/tdm-0123456789/" + "x" * 500)
    log = world.folder / "logs" / "access.jsonl"
    await until(lambda: log.exists() and log.read_text().count('"status": 404') == 2)
    assert "tdm-" not in log.read_text()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["path"] for line in lines if line.get("status") == 404] == ["/v1/models/*", "/*/*"]


async def test_a_flood_without_a_key_is_counted_in_one_line_a_second(world: World):
    new = await with_key(world)
    began = time.monotonic()
    wrong = {"authorization": "Bearer tdm-wrong"}
    for _ in range(20):
        await asyncio.gather(*(world.http.get("/v1/models", headers=wrong) for _ in range(10)))
    await world.http.get("/v1/models")
    log = world.folder / "logs" / "access.jsonl"

    def lines() -> list[Any]:
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    await until(lambda: sum(line.get("requests", 0) for line in lines()) >= 200)
    await until(lambda: any(line.get("key_id") == new.key.id for line in lines()))
    counts = [line for line in lines() if line.get("event") == "refused"]
    assert len(counts) <= 2 + (time.monotonic() - began) and not any(line.get("status") == 401 for line in lines())


async def test_an_admin_reads_usage_and_limits_tenants_over_http(world: World):
    admin = {"authorization": "Bearer secret"}
    assert (await world.http.get("/admin/usage", headers={"authorization": "Bearer x"})).status_code in (401, 403)
    labels = UsageLabels("key_1", "lab", "base@1", "", "/v1/completions")
    store = UsageStore.at(world.registry.address)
    store.add("w", 1, {UsageKey.at(labels, time.time()): UsageCounts(2, 10, 20)})
    page = (await world.http.get("/admin/usage", params={"by": "tenant"}, headers=admin)).json()
    assert page["data"] == [
        {"tenant": "lab", "requests": 2, "prompt_tokens": 10, "completion_tokens": 20, "estimated_requests": 0}
    ]
    text = await world.http.get("/admin/usage", params={"by": "key_id", "format": "csv"}, headers=admin)
    assert text.headers["content-type"].startswith("text/csv") and "key_1,2,10,20,0" in text.text
    wrong = await world.http.get("/admin/usage", params={"by": "modle"}, headers=admin)
    assert wrong.status_code == 400 and "Did you mean 'model'" in wrong.json()["error"]["message"]
    limits = {"requests_per_minute": 9}
    changed = await world.http.put("/admin/tenants/lab/limits", json=limits, headers=admin)
    assert changed.status_code == 200 and changed.json()["limits"]["requests_per_minute"] == 9
    await until(lambda: world.app.state.identity.keys.tenant_limits("lab") == Limits(requests_per_minute=9))
    await world.http.post("/admin/keys", json={"name": "x", "tenant": "shop"}, headers=admin)
    listed = (await world.http.get("/admin/tenants", headers=admin)).json()["data"]
    assert [(each["tenant"], each["keys"]) for each in listed] == [("lab", 0), ("shop", 1)]


@pytest.mark.parametrize(
    ("key", "tenant", "given", "counts"),
    [
        (None, None, -5, 0),
        (None, None, 3, 3),
        (-3, None, -5, -3),
        (None, -3, -5, -3),
        (-3, -1, -5, -1),
        (-1, -3, -5, -1),
        (-3, 0, -5, 0),
        (2, None, 0, 2),
    ],
)
async def test_a_priority_is_as_urgent_as_key_and_tenant_allow_and_zero_without_a_limit(
    world: World, key: int | None, tenant: int | None, given: int, counts: int
):
    await world.add_engine(echo())
    await with_key(world, Limits(highest_priority=key))
    await limit_tenant(world, "lab", Limits(highest_priority=tenant))
    assert await priority_of(world, given) == counts


async def test_without_keys_any_priority_counts(world: World):
    await world.add_engine(echo())
    assert await priority_of(world, -5) == -5


async def priority_of(world: World, given: int) -> int:
    """The priority with which a request that gives one is queued."""
    admission, found = world.app.state.admission, []
    slot = admission.slot

    def noted(model: Any, hints: Any, **options: Any) -> Any:
        found.append(hints.priority)
        return slot(model, hints, **options)

    admission.slot = noted
    assert (await world.http.post("/v1/completions", json={**BODY, "priority": given})).status_code == 200
    (priority,) = found
    return int(priority)
