"""Byte budget: bodies count from their first byte until an engine has answered, and the gateway keeps none of them longer."""

from __future__ import annotations

import asyncio
import functools
import json
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from overload_world import ROUTE, Listening, World, overload_world

from tandem.config import GatewayConfig
from tandem.errors import ConfigError
from tandem.gateway.errors import ApiError
from tandem.gateway.requests.held_bytes import STALLED_S, HeldBytes
from tandem.routing.records import ReplicaRecord

MIB = 2**20
LARGE = {"model": "base", "prompt": "x" * 400_000}


def test_a_body_that_does_not_fit_is_503_with_the_numbers_and_others_keep_theirs() -> None:
    budget = HeldBytes(100, 5)
    one, two = budget.body(), budget.body()
    one.grow_to(60)
    one.grow_to(50)
    with pytest.raises(ApiError, match="60 bytes of other requests, and 41 more would exceed 100") as error:
        two.grow_to(41)
    assert error.value.status == 503 and error.value.headers["Retry-After"] == "5" and budget.held == 60
    two.grow_to(40)
    one.release(), one.release()
    assert budget.held == 40
    two.release()
    assert budget.held == 0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_one_tenant_holds_half_of_the_budget_at_most() -> None:
    budget = HeldBytes(100, 5)
    one, two = budget.body("lab"), budget.body("lab")
    one.grow_to(40)
    with pytest.raises(ApiError, match="half of that for one tenant"):
        two.grow_to(11)
    budget.body("other").grow_to(50)
    one.release()
    two.grow_to(50)
    budget.body().release()


def test_the_upload_that_has_stalled_for_longest_makes_room() -> None:
    clock, ended = Clock(), list[str]()
    budget = HeldBytes(100, 5, clock)
    bodies = {}
    for name, tenant in (("whole", "a"), ("oldest", "b"), ("older", "a"), ("newest", "b")):
        bodies[name] = budget.body(tenant)
        bodies[name].begin(functools.partial(ended.append, name))
        bodies[name].grow_to(25)
        clock.now += 0.1
    bodies["whole"].end()
    new = budget.body("c")
    with pytest.raises(ApiError):
        new.grow_to(25)  # all have sent something in the last second
    clock.now = 5.0
    new.grow_to(25)
    assert ended == ["oldest"]
    new.grow_to(45)
    assert ended == ["oldest", "older"] and not bodies["whole"].evicted
    with pytest.raises(ApiError):
        bodies["older"].grow_to(30)


def test_in_a_full_share_uploads_of_the_same_tenant_make_room() -> None:
    clock, ended = Clock(), list[str]()
    budget = HeldBytes(100, 5, clock)
    for name, tenant in (("other", "b"), ("own", "a")):
        body = budget.body(tenant)
        body.begin(functools.partial(ended.append, name))
        body.grow_to(40)
    clock.now = 5.0
    budget.body("a").grow_to(20)
    assert ended == ["own"]


def test_the_budget_holds_at_least_one_body() -> None:
    with pytest.raises(ConfigError, match="gateway.max_held_bytes"):
        GatewayConfig(max_held_bytes=MIB)


@pytest.fixture
async def tight(tmp_path: Path) -> AsyncIterator[World]:
    """A gateway that holds 1 MiB, with an engine that answers one request at a time."""
    config = GatewayConfig(max_body_bytes=MIB // 2, max_held_bytes=MIB, upload_timeout_s=60.0)
    async with overload_world(tmp_path, config, requests_per_replica=1) as world:
        yield world


async def test_waiting_bodies_count_and_running_ones_do_not(tight: World) -> None:
    engine, held = Listening(delay_s=0.02), tight.app.state.relay.held_bytes
    await tight.add(engine)
    first = tight.ask("first", 100, stream=True)
    await tight.until(lambda: engine.asked == ["first"] and held.held == 0)
    waiting = [asyncio.create_task(tight.http.post(ROUTE, json=LARGE)) for _ in range(2)]
    await tight.queued(2)
    assert 800_000 < held.held <= MIB
    for path, status in ((ROUTE, 503), ("/v1/messages", 529)):
        refused = await tight.http.post(path, json=LARGE)
        assert refused.status_code == status and refused.headers["retry-after"] == "5", refused.text
        assert "gateway.max_held_bytes" in refused.json()["error"]["message"]
    # Small requests still find room.
    assert tight.ask("small") and (await first).status_code == 200
    assert [(await each).status_code for each in waiting] == [200, 200]
    await tight.until(lambda: held.held == 0)


async def test_bodies_that_are_refused_broken_off_or_never_sent_are_released(tight: World) -> None:
    held = tight.app.state.relay.held_bytes
    await tight.add(Listening())
    for body in (b"{", b'{"model": "none", "prompt": "x"}', b'{"model": "base", "prompt": "x", "n": 99}'):
        answer = await tight.http.post(ROUTE, content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 404) and held.held == 0
    url = tight.http.base_url
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 300000\r\n\r\n"
    writers = [(await asyncio.open_connection(url.host, url.port))[1] for _ in range(3)]
    for writer in writers:
        writer.write(head + b"{" * 1000)
    # What has come counts, not what a client has announced.
    await tight.until(lambda: held.held == 3000)
    for writer in writers:
        writer.close()
    await tight.until(lambda: held.held == 0)


async def test_stalled_uploads_make_room_and_their_clients_are_told(tight: World) -> None:
    await tight.add(Listening())
    url, held, clock = tight.http.base_url, tight.app.state.relay.held_bytes, Clock()
    held._clock = clock
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 400000\r\n\r\n"
    connections = [await asyncio.open_connection(url.host, url.port) for _ in range(3)]
    for _, writer in connections:
        writer.write(head + b"{" * 340_000)
    await tight.until(lambda: held.held == 3 * 340_000)
    # They have sent something just now.
    assert (await tight.http.post(ROUTE, json=LARGE)).status_code == 503
    clock.now = STALLED_S
    assert (await tight.http.post(ROUTE, json={"model": "base", "prompt": "x" * 100_000})).status_code == 200
    assert b" 503 " in await asyncio.wait_for(connections[0][0].readline(), 10)
    # One was enough; the others have their time.
    await tight.until(lambda: held.held == 2 * 340_000)
    for _, writer in connections:
        writer.close()
    await tight.until(lambda: held.held == 0)


async def test_the_gateway_keeps_no_body_of_a_request_that_is_being_answered(tmp_path: Path) -> None:
    """With an engine that itself drops what it is sent, in this process."""
    streams, length = 8, MIB
    done = asyncio.Event()
    answering = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal answering
        while await request.content.readany():
            pass
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: {}\n\n")
        answering += 1
        await done.wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    engine = web.Application()
    engine.router.add_post(ROUTE, answer)
    runner = web.AppRunner(engine)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    body = json.dumps({"model": "base", "prompt": "x" * length, "stream": True}).encode()
    async with overload_world(tmp_path) as world:
        world.records["r"] = ReplicaRecord(id="r", pool="base", url=f"http://{host}:{port}", token="t")
        world.version += 1
        await asyncio.sleep(0.1)

        async def ask() -> int:
            asked = world.http.stream("POST", ROUTE, content=body, headers={"content-type": "application/json"})
            async with asked as response:
                return len(await response.aread())

        tracemalloc.start()
        try:
            asked = [asyncio.create_task(ask()) for _ in range(streams)]
            await world.until(lambda: answering == streams)
            await world.until(lambda: world.app.state.relay.held_bytes.held == 0)
            await asyncio.sleep(0.2)
            large = [trace.size for trace in tracemalloc.take_snapshot().traces if trace.size > length // 2]
        finally:
            tracemalloc.stop()
        done.set()
        assert all([await each for each in asked])
        assert large == []
    await runner.cleanup()
