"""When there is more than the engines can do: queues, priorities, deadlines, clients that leave or do not read."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from overload_world import ROUTE, Listening, World, overload_world
from pydantic_core import to_json
from starlette.types import Message

from tandem.config import GatewayConfig
from tandem.engine.echo import EchoEngine
from tandem.serve.host import EngineHost
from tandem.serve.records import ReplicaRecord

GAP_S = 0.02


@pytest.fixture
async def narrow(tmp_path: Path) -> AsyncIterator[tuple[World, Listening]]:
    """One engine that gets one request at a time, and two may wait."""
    async with overload_world(tmp_path, requests_per_replica=1, max_queued=2) as world:
        engine = Listening(delay_s=GAP_S)
        await world.add(engine)
        yield world, engine


async def test_beyond_the_bound_it_is_429_with_retry_after_in_each_apis_shape(narrow: tuple[World, Listening]) -> None:
    world, engine = narrow
    asked = [world.ask(name, 40) for name in ("one", "two", "three")]
    await world.queued(2)
    for path, extra in ((ROUTE, {"prompt": "x"}), ("/v1/messages", {"messages": [], "max_tokens": 4})):
        answer = await world.http.post(path, json={"model": "base", **extra})
        assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert "1 requests in flight and 2 waiting" in answer.json()["error"]["message"]
    # What an engine does beside generating needs no place.
    assert (await world.http.post("/tokenize", json={"model": "base", "prompt": "x"})).status_code == 200
    assert [(await each).status_code for each in asked] == [200] * 3
    assert engine.asked == ["one", "two", "three"] and world.admission.waiting() == {"base": 0}


async def test_a_better_priority_overtakes_and_takes_the_place_of_a_worse_one(narrow: tuple[World, Listening]) -> None:
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


async def test_what_expires_while_it_waits_is_504_and_no_engine_sees_it(narrow: tuple[World, Listening]) -> None:
    world, engine = narrow
    first = world.ask("first", 60)
    await world.queued(0)
    await world.until(lambda: engine.asked == ["first"])
    late = await world.ask("late", timeout=0.3)
    assert late.status_code == 504 and late.headers["x-should-retry"] == "false"
    assert late.json()["error"]["code"] == "deadline_exceeded"
    assert (await first).status_code == 200 and engine.asked == ["first"]


async def test_the_patience_that_an_sdk_tells_counts_as_a_deadline(narrow: tuple[World, Listening]) -> None:
    world, engine = narrow
    first = world.ask("first", 60)
    await world.until(lambda: engine.asked == ["first"])
    late = world.ask("late", headers={"x-stainless-read-timeout": "0.2"})
    stream = world.ask("stream", headers={"x-stainless-read-timeout": "0.2"}, stream=True)
    assert {(await each).status_code for each in (late, stream)} == {504} and not first.done()
    assert (await first).status_code == 200
    # Once its answer has begun, a stream may take longer: its client sees that it goes on.
    long = await world.ask("long", 30, headers={"x-stainless-read-timeout": "0.2"}, stream=True)
    assert long.text.endswith("data: [DONE]\n\n") and engine.asked == ["first", "long"]


async def test_a_deadline_ends_an_answer_that_is_under_way(narrow: tuple[World, Listening]) -> None:
    world, engine = narrow
    whole = await world.ask("whole", 2000, timeout=0.3)
    assert whole.status_code == 504 and "not whole in time" in whole.json()["error"]["message"]
    stream = await world.ask("stream", 2000, timeout=0.3, stream=True)
    events = [line for line in stream.text.split("\n\n") if line]
    assert stream.status_code == 200 and len(events) > 3
    assert '"deadline_exceeded"' in events[-1] and "[DONE]" not in stream.text
    messages = {"model": "base", "messages": [{"role": "user", "content": "x " * 2000}], "stream": True, "timeout": 0.3}
    assert '"deadline_exceeded"' in (await world.http.post("/v1/chat/completions", json=messages)).text
    await world.until(lambda: engine.aborted == 3 and engine.stats().running == 0)


async def test_who_leaves_while_it_waits_frees_its_place_and_no_engine_sees_it(narrow: tuple[World, Listening]) -> None:
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


async def test_with_several_gateways_each_has_its_share(tmp_path: Path) -> None:
    async with overload_world(tmp_path, GatewayConfig(replicas=2), requests_per_replica=4, max_queued=2) as world:
        engine = Listening(delay_s=GAP_S)
        await world.add(engine)
        asked = [world.ask("x", 40) for _ in range(4)]
        statuses = sorted([(await each).status_code for each in asked])
        assert statuses == [200, 200, 200, 429]


async def test_an_engines_own_bound_and_a_quarter_more_is_the_limit_by_default(tmp_path: Path) -> None:
    async with overload_world(tmp_path, max_queued=3) as world:
        engine = Listening(delay_s=GAP_S)
        await world.add(engine, max_running=20)
        asked = [world.ask("x", 40) for _ in range(28)]
        await world.queued(3)
        await world.until(lambda: engine.stats().running == 25)
        assert {(await each).status_code for each in asked} == {200}
        unbounded = Listening(delay_s=GAP_S)
        await world.add(unbounded)
        asked = [world.ask("x", 10) for _ in range(60)]
        assert {(await each).status_code for each in asked} == {200}


async def test_requests_at_a_replica_that_drains_take_no_room_of_the_new_one(tmp_path: Path) -> None:
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
async def test_a_request_that_its_replica_has_not_begun_with_waits_for_the_next_one(tmp_path: Path, way: str) -> None:
    async with overload_world(tmp_path, hold_s=10.0) as world:
        if way == "dead":
            old = Listening()
            await world.add(old)
            old.die()
        else:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
            world.records["gone"] = ReplicaRecord(id="gone", base="base", url=f"http://127.0.0.1:{port}", token="x")
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
async def test_a_timeout_or_a_priority_that_cannot_be_is_400(narrow: tuple[World, Listening], body: Any) -> None:
    world, _ = narrow
    answer = await world.ask("x", **body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] in body


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
async def test_an_engine_hears_of_priorities_only_if_it_heeds_them_and_never_of_timeouts(
    tmp_path: Path, policy: str
) -> None:
    async with overload_world(tmp_path, engine_args={"scheduling_policy": policy}) as world:
        await world.add(EchoEngine(("base",)))
        body = {"model": "base", "input": "x", "timeout": 5, "priority": 3}
        echoed = (await world.http.post("/v1/embeddings", json=body)).json()["request"]
        assert "timeout" not in echoed and echoed.get("priority") == (3 if policy == "priority" else None)


async def test_a_client_that_takes_nothing_of_its_answer_is_cut_off(tmp_path: Path) -> None:
    async with overload_world(tmp_path, GatewayConfig(client_stall_s=0.4), requests_per_replica=1) as world:
        engine = Listening()
        await world.add(engine)
        with socket.create_connection((world.http.base_url.host, world.http.base_url.port or 0)) as client:
            client.sendall(large_request())
            await world.until(lambda: engine.stats().running == 1)
            await world.until(lambda: engine.aborted == 1)
            # Its place is free although it is still connected.
            assert (await world.ask("next")).status_code == 200


class Breaking(EchoEngine):
    """Its streams break off after the first event."""

    async def _stream(self, *args: Any, **options: Any) -> AsyncIterator[bytes]:
        async for event in super()._stream(*args, **options):
            yield event
            await asyncio.sleep(0.1)
            raise RuntimeError("The engine fails in the middle, as its test asks it to.")


def is_head(message: Message) -> bool:
    return message["type"] == "http.response.start"


def is_end(message: Message) -> bool:
    return not is_head(message) and not message.get("more_body")


def is_error_event(message: Message) -> bool:
    return b"engine_unavailable" in message.get("body", b"")


@pytest.mark.parametrize(
    ("engine", "stream", "untaken"),
    [
        *(
            (engine, stream, each)
            for engine in ("well", "refuses")
            for stream in (True, False)
            for each in (is_head, is_end)
        ),
        ("breaks", True, is_error_event),
        ("breaks", True, is_end),
    ],
)
async def test_a_client_that_does_not_take_the_head_or_the_last_of_its_answer_is_cut_off_too(
    tmp_path: Path, engine: str, stream: bool, untaken: Callable[[Message], bool]
) -> None:
    async with overload_world(tmp_path, GatewayConfig(client_stall_s=0.2), requests_per_replica=1) as world:
        made = Breaking if engine == "breaks" else EchoEngine
        await world.add(made(() if engine == "refuses" else ("base",)))
        asked = [{"type": "http.request", "body": to_json({"model": "base", "prompt": "one two", "stream": stream})}]

        async def receive() -> Message:
            return asked.pop() if asked else await asyncio.Event().wait()  # type: ignore[return-value]

        async def send(message: Message) -> None:
            if untaken(message):
                await asyncio.Event().wait()

        scope = {"type": "http", "method": "POST", "path": ROUTE, "query_string": b"", "headers": []}
        with pytest.raises(ConnectionAbortedError):
            await asyncio.wait_for(world.app(scope, receive, send), 5)
        assert (await world.ask("next")).status_code == (404 if engine == "refuses" else 200)


GATEWAY = """
import asyncio, contextlib, socket, sys
import uvicorn
from tandem.config import ServedModelConfig
from tandem.gateway.app import create_app
from tandem.registry import Registry
from tandem.serve.records import ReplicaRecord, ServedModel, Snapshot

url, token, folder = sys.argv[1:]

async def watch(version):
    await asyncio.sleep(0.5 if version else 0)
    return Snapshot(version=1, replicas=(ReplicaRecord(id="r", base="base", url=url, token=token),))

served = ServedModel(id="base", name="base", path="", config=ServedModelConfig(model="base"))
app = create_app(models=[served], watch=watch, registry=Registry(f"sqlite:///{folder}/tandem.db"))
sock = socket.create_server(("127.0.0.1", 0))
print(sock.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config(app, lifespan="on", log_level="critical")).run(sockets=[sock])
"""
READERS, ANSWER_MB, GROWTH_MB = 16, 48, 32


async def test_clients_that_do_not_read_grow_neither_the_gateway_nor_its_engines_work(tmp_path: Path) -> None:
    engine = EchoEngine(("base",))
    host = EngineHost(engine, max_adapters=0)
    await host.start()
    gateway = await asyncio.create_subprocess_exec(
        sys.executable, "-c", GATEWAY, host.url, host.token, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert gateway.stdout is not None
    port = int(await gateway.stdout.readline())
    clients = []
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
            for _ in range(5):
                assert (await http.post(ROUTE, json={"model": "base", "prompt": "x " * 50})).status_code == 200
            memory = psutil.Process(gateway.pid).memory_info
            before = memory().rss
            for _ in range(READERS):
                client = socket.create_connection(("127.0.0.1", port))
                clients.append(client)
                client.sendall(large_request())
            # Until all buffers on the way are full.
            deadline, last = time.monotonic() + 30, 0
            while time.monotonic() < deadline and (engine.stats().running < READERS or memory().rss - last > 2**20):
                last = memory().rss
                await asyncio.sleep(0.5)
            assert engine.stats().running == READERS, "the engine wrote all of it"
            assert memory().rss - before < GROWTH_MB * 2**20
            assert (await http.post(ROUTE, json={"model": "base", "prompt": "x"})).status_code == 200
    finally:
        for client in clients:
            client.close()
        gateway.terminate()
        await gateway.wait()
        await host.drain(0)


def large_request() -> bytes:
    """A request for a stream of `ANSWER_MB`, in events of 4 KiB."""
    body = b'{"model": "base", "prompt": "%s", "stream": true, "ignore_eos": true, "max_tokens": %d}' % (
        b"x" * 4096,
        ANSWER_MB * 256,
    )
    return b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
        ROUTE.encode(),
        len(body),
        body,
    )
