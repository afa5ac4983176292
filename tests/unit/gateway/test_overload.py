"""Overload: queues, priorities, deadlines, disconnecting clients."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gateway_world import Reflecting
from overload_world import ROUTE, Listening, World, overload_world

from tandem.config import GatewayConfig
from tandem.routing.records import ReplicaRecord

GAP_S = 0.02


@pytest.fixture
async def narrow(tmp_path: Path) -> AsyncIterator[tuple[World, Listening]]:
    """One engine that gets one request at a time, and two may wait."""
    async with overload_world(tmp_path, requests_per_replica=1, max_queued=2) as world:
        engine = Listening(delay_s=GAP_S)
        await world.add(engine)
        yield world, engine


async def test_a_full_queue_is_429_with_retry_after_in_each_apis_format(narrow: tuple[World, Listening]) -> None:
    world, engine = narrow
    asked = [world.ask(name, 40) for name in ("one", "two", "three")]
    await world.queued(2)
    for path, extra in (
        (ROUTE, {"prompt": "x"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}),
    ):
        answer = await world.http.post(path, json={"model": "base", **extra})
        assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert "1 requests in flight and 2 waiting" in answer.json()["error"]["message"]
    # What an engine does beside generating needs no slot.
    assert (await world.http.post("/tokenize", json={"model": "base", "prompt": "x"})).status_code == 200
    assert [(await each).status_code for each in asked] == [200] * 3
    assert engine.asked == ["one", "two", "three"] and world.admission.waiting() == {"base": 0}


async def test_a_better_priority_overtakes_and_displaces_a_worse_one(narrow: tuple[World, Listening]) -> None:
    world, engine = narrow
    first = world.ask("first", 60)
    await world.until(lambda: engine.asked == ["first"])
    usual = world.ask("usual", priority=5)
    await world.queued(1)
    last = world.ask("last", priority=5)
    await world.queued(2)
    urgent = world.ask("urgent", priority=-3)
    refused = await last
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "displaced"
    assert [(await each).status_code for each in (first, usual, urgent)] == [200] * 3
    assert engine.asked == ["first", "urgent", "usual"]


async def test_a_request_that_expires_in_the_queue_is_504_and_reaches_no_engine(
    narrow: tuple[World, Listening],
) -> None:
    world, engine = narrow
    first = world.ask("first", 60)
    await world.queued(0)
    await world.until(lambda: engine.asked == ["first"])
    late = await world.ask("late", timeout=0.3)
    assert late.status_code == 504 and late.headers["x-should-retry"] == "false"
    assert late.json()["error"]["code"] == "deadline_exceeded"
    assert (await first).status_code == 200 and engine.asked == ["first"]


async def test_an_sdks_read_timeout_counts_as_a_deadline(narrow: tuple[World, Listening]) -> None:
    world, engine = narrow
    first = world.ask("first", 60)
    await world.until(lambda: engine.asked == ["first"])
    late = world.ask("late", headers={"x-stainless-read-timeout": "0.2"})
    stream = world.ask("stream", headers={"x-stainless-read-timeout": "0.2"}, stream=True)
    assert {(await each).status_code for each in (late, stream)} == {504} and not first.done()
    assert (await first).status_code == 200
    # Once its answer has begun, a stream may take longer: its client sees that it goes on.
    long = await world.ask("long", 150, headers={"x-stainless-read-timeout": "2"}, stream=True)
    assert long.text.endswith("data: [DONE]\n\n") and engine.asked == ["first", "long"]


async def test_a_deadline_ends_an_answer_that_is_being_sent(narrow: tuple[World, Listening]) -> None:
    world, engine = narrow
    complete = await world.ask("whole", 2000, timeout=2.0)
    assert complete.status_code == 504 and "not whole in time" in complete.json()["error"]["message"]
    stream = await world.ask("stream", 2000, timeout=2.0, stream=True)
    events = [line for line in stream.text.split("\n\n") if line]
    assert stream.status_code == 200 and len(events) > 3
    assert '"deadline_exceeded"' in events[-1] and "[DONE]" not in stream.text
    messages = {"model": "base", "messages": [{"role": "user", "content": "x " * 2000}], "stream": True, "timeout": 2.0}
    assert '"deadline_exceeded"' in (await world.http.post("/v1/chat/completions", json=messages)).text
    await world.until(lambda: engine.aborted == 3 and engine.stats().running == 0)


async def test_a_disconnect_in_the_queue_frees_the_place_and_reaches_no_engine(narrow: tuple[World, Listening]) -> None:
    world, engine = narrow
    first = world.ask("first", 60)
    await world.until(lambda: engine.asked == ["first"])
    leaving = [world.ask("leaver", stream=stream) for stream in (True, False)]
    await world.queued(2)
    for each in leaving:
        each.cancel()
    await world.queued(0)
    assert not first.done()
    last = world.ask("last")
    assert [(await each).status_code for each in (first, last)] == [200, 200]
    assert engine.asked == ["first", "last"]


async def test_several_gateways_share_the_limits(tmp_path: Path) -> None:
    async with overload_world(tmp_path, GatewayConfig(replicas=2), requests_per_replica=4, max_queued=2) as world:
        engine = Listening(delay_s=GAP_S)
        await world.add(engine)
        asked = [world.ask("x", 40) for _ in range(4)]
        statuses = sorted([(await each).status_code for each in asked])
        assert statuses == [200, 200, 200, 429]


async def test_the_default_limit_is_the_engines_batch_size_plus_a_quarter(tmp_path: Path) -> None:
    async with overload_world(tmp_path, max_queued=3) as world:
        engine = Listening(delay_s=GAP_S)
        await world.add(engine, max_running=20)
        asked = [world.ask("x", 300) for _ in range(28)]
        await world.queued(3)
        await world.until(lambda: engine.stats().running == 25)
        assert {(await each).status_code for each in asked} == {200}
        unbounded = Listening(delay_s=GAP_S)
        await world.add(unbounded)
        asked = [world.ask("x", 10) for _ in range(60)]
        assert {(await each).status_code for each in asked} == {200}


async def test_requests_at_a_draining_replica_do_not_count_against_the_limit(tmp_path: Path) -> None:
    async with overload_world(tmp_path, requests_per_replica=2) as world:
        old, new = Listening(delay_s=GAP_S), Listening(delay_s=GAP_S)
        record = await world.add(old)
        asked = [world.ask("old", 100) for _ in range(2)]
        await world.until(lambda: len(old.asked) == 2)
        world.records[record.id] = replace(record, state="draining")
        await world.add(new)
        answers = await asyncio.gather(world.ask("new"), world.ask("new"))
        assert [answer.status_code for answer in answers] == [200, 200]
        assert not any(each.done() for each in asked) and new.asked == ["new", "new"]
        assert [(await each).status_code for each in asked] == [200, 200]


async def test_a_request_without_a_replica_is_held_until_one_is_ready(tmp_path: Path) -> None:
    async with overload_world(tmp_path, hold_s=10.0) as world:
        held = [world.ask("held", stream=stream) for stream in (True, False)]
        await world.queued(2)
        engine = Listening()
        await world.add(engine)
        assert [(await each).status_code for each in held] == [200, 200] and engine.asked == ["held", "held"]


async def test_a_request_that_is_held_too_long_is_503_with_retry_after(tmp_path: Path) -> None:
    async with overload_world(tmp_path, GatewayConfig(retry_after_s=7), hold_s=0.2, max_queued=1) as world:
        held = world.ask("held")
        await world.queued(1)
        assert (await world.ask("more")).status_code == 429
        answer = await held
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
        assert answer.json()["error"]["code"] == "engine_unavailable"


@pytest.mark.parametrize("way", ["refused", "dead"])
async def test_a_request_that_its_replica_did_not_begin_waits_for_the_next(tmp_path: Path, way: str) -> None:
    async with overload_world(tmp_path, hold_s=10.0) as world:
        if way == "dead":
            old = Listening()
            await world.add(old)
            old.die()
        else:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
            world.records["gone"] = ReplicaRecord(id="gone", pool="base", url=f"http://127.0.0.1:{port}", token="x")
            world.version += 1
            await asyncio.sleep(0.1)
        asked = [world.ask("asked") for _ in range(5)]
        await world.queued(5)
        engine = Listening()
        await world.add(engine)
        assert {(await each).status_code for each in asked} == {200} and len(engine.asked) == 5


WRONG: list[dict[str, Any]] = [
    {"timeout": 0},
    {"timeout": -1},
    {"timeout": "5"},
    {"timeout": True},
    {"timeout": 1e9},
    {"priority": "high"},
    {"priority": 1.5},
    {"priority": True},
    {"priority": 2**63},
]


@pytest.mark.parametrize("body", WRONG, ids=repr)
async def test_an_invalid_timeout_or_priority_is_400(narrow: tuple[World, Listening], body: Any) -> None:
    world, _ = narrow
    answer = await world.ask("x", **body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] in body


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
async def test_priority_is_passed_only_to_engines_that_schedule_by_it_and_timeout_never(
    tmp_path: Path, policy: str
) -> None:
    async with overload_world(tmp_path, engine_args={"scheduling_policy": policy}) as world:
        await world.add(Reflecting(("base",)))
        body = {"model": "base", "input": "x", "timeout": 5, "priority": 3}
        echoed = (await world.http.post("/v1/embeddings", json=body)).json()["request"]
        assert "timeout" not in echoed and echoed.get("priority") == (3 if policy == "priority" else None)
