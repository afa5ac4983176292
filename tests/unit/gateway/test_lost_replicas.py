"""Requests at lost replicas are retried or end with an error: real HTTP on both sides, no Ray."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import httpx
import pytest
from gateway_world import BODY, World, echo
from gateway_world import world as world

from tandem.routing.records import ReplicaRecord, State

SLOW_S = 60.0


def lose(world: World, name: str, state: State = "stuck") -> None:
    world.records[name] = replace(world.records[name], state=state)
    world.version += 1


async def begun(world: World, engine: int) -> None:
    while not world.engines[engine].stats().running:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unanswered_request_is_retried_once_on_another_replica(world: World, stream: bool) -> None:
    await world.add_engine(echo(delay_s=SLOW_S))
    asking = asyncio.create_task(world.http.post("/v1/completions", json={**BODY, "stream": stream}))
    await begun(world, 0)
    await world.add_engine(echo())
    lose(world, "r0")
    answer = await asyncio.wait_for(asking, 10)
    assert answer.status_code == 200
    assert answer.text.count('"one"' if stream else "one two three") == 1
    assert world.engines[1].stats().steps == 3


async def test_without_another_replica_a_failed_request_is_503_with_retry_after(world: World) -> None:
    await world.add_engine(echo(delay_s=SLOW_S))
    asking = asyncio.create_task(world.http.post("/v1/completions", json=BODY))
    await begun(world, 0)
    lose(world, "r0")
    answer = await asyncio.wait_for(asking, 10)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "7"


async def test_a_stream_that_has_begun_ends_with_an_error_event(world: World) -> None:
    await world.add_engine(echo(delay_s=0.2))
    await world.add_engine(echo())
    world.records["r1"] = replace(world.records["r1"], state="draining")
    world.version += 1
    await asyncio.sleep(0.1)
    words = " ".join(["word"] * 60)
    said = ""
    async with world.http.stream("POST", "/v1/completions", json={**BODY, "prompt": words, "stream": True}) as answer:
        async for text in answer.aiter_text():
            if not said:
                lose(world, "r0")
            said += text
    assert '"word"' in said and "engine_unavailable" in said and "[DONE]" not in said


async def test_requests_at_other_replicas_continue(world: World) -> None:
    await world.add_engine(echo(delay_s=SLOW_S))
    waiting = asyncio.create_task(world.http.post("/v1/completions", json=BODY))
    await begun(world, 0)
    await world.add_engine(echo(delay_s=0.1))
    words = " ".join(["word"] * 20)
    other = asyncio.create_task(world.http.post("/v1/completions", json={**BODY, "prompt": words}))
    await begun(world, 1)
    lose(world, "r0")
    first, second = await asyncio.wait_for(asyncio.gather(waiting, other), 20)
    assert first.status_code == second.status_code == 200


async def test_a_silent_replica_that_answers_a_probe_keeps_its_streams_and_gets_requests(world: World) -> None:
    await world.add_engine(echo(delay_s=0.2))
    words = " ".join(f"word{number}" for number in range(40))
    asking = asyncio.create_task(world.http.post("/v1/completions", json={**BODY, "prompt": words, "stream": True}))
    await begun(world, 0)
    lose(world, "r0", "silent")
    another = await asyncio.wait_for(retried(world), 30)
    assert not asking.done()
    answer = await asyncio.wait_for(asking, 60)
    assert answer.text.endswith("data: [DONE]\n\n") and answer.text.count("data: {") == 40
    assert another.json()["choices"][0]["text"] == BODY["prompt"]


async def test_connections_to_a_silent_replica_without_probe_answer_are_aborted(world: World) -> None:
    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # From Python 3.12 on, a server that closes waits for its connections.
        with contextlib.suppress(ConnectionError), contextlib.closing(writer):
            while await reader.read(1024):
                took.set()

    took = asyncio.Event()
    async with await asyncio.start_server(swallow, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        world.records["frozen"] = ReplicaRecord(id="frozen", pool="base@1", url=url, token="t")
        world.version += 1
        await asyncio.sleep(0.1)
        asking = asyncio.create_task(world.http.post("/v1/completions", json=BODY))
        await took.wait()
        await world.add_engine(echo())
        lose(world, "frozen", "silent")
        answer = await asyncio.wait_for(asking, 15)
    assert answer.status_code == 200 and world.engines[0].stats().steps == 3


async def retried(world: World) -> httpx.Response:
    """An answer, once there is a replica to give it."""
    while (answer := await world.http.post("/v1/completions", json=BODY)).status_code == 503:
        await asyncio.sleep(0.05)
    return answer
