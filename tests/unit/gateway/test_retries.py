"""Retries of requests that a replica refused, broke off or died of: real HTTP on both sides, no Ray."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from overload_world import Listening, Mortal, overload_world

from tandem.config import GatewayConfig, PrefillConfig

COUNT = {"model": "base", "prompt": "x"}


async def test_light_requests_that_lose_their_replica_are_answered_by_the_next(
    tmp_path: Path,
) -> None:
    async with overload_world(tmp_path, hold_s=10.0, requests_per_replica=1) as world:
        dying = Mortal(light_calls=3)
        await world.add(dying)
        light = [asyncio.create_task(world.http.post("/tokenize", json=COUNT)) for _ in range(3)]
        await world.queued(3)
        await world.add(Listening())
        answers = await asyncio.wait_for(asyncio.gather(*light), 5)
        assert [answer.status_code for answer in answers] == [200] * 3
        assert dying.asked == ["other"] * 3 and world.admission.waiting() == {"base": 0}
        assert [(await world.ask("next")).status_code for _ in range(3)] == [200] * 3


async def test_time_in_the_queue_does_not_count_as_time_without_a_replica(
    tmp_path: Path,
) -> None:
    async with overload_world(tmp_path, hold_s=1.0, requests_per_replica=1) as world:
        dying = Mortal(delay_s=0.1)
        await world.add(dying)
        first = world.ask("first", 15)
        await world.until(lambda: dying.asked == ["first"])
        patient, poison = world.ask("patient", priority=2), world.ask("poison", 1, priority=1)
        await world.queued(2)
        assert (await first).status_code == 200
        # Its replica is gone by now, and both have waited for longer than they would be held.
        await world.until(lambda: "poison" in dying.asked)
        await world.queued(2)
        await world.add(Listening())
        assert [(await each).status_code for each in (patient, poison)] == [200, 200]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_kills_engines_reaches_two_of_them_at_most(tmp_path: Path, stream: bool) -> None:
    async with overload_world(tmp_path, hold_s=10.0) as world:
        engines = [Mortal() for _ in range(4)]
        for engine in engines:
            await world.add(engine)
        answer = await world.ask("poison", 1, stream=stream)
        assert answer.status_code == 503 and "has died" in answer.json()["error"]["message"]
        assert sorted(len(engine.asked) for engine in engines) == [0, 0, 1, 1]
        # Who finds them dead has not begun there: it goes on to one that lives.
        assert [(await world.ask("next", stream=stream)).status_code for _ in range(4)] == [200] * 4


async def test_a_prompt_that_killed_a_prefill_replica_reaches_one_more_replica(tmp_path: Path) -> None:
    async with overload_world(tmp_path, hold_s=10.0, prefill=PrefillConfig()) as world:
        engines = [Mortal() for _ in range(4)]
        for number, engine in enumerate(engines):
            await world.add(engine, prefills=number < 2)
        assert (await world.ask("poison", 1)).status_code == 503
        assert [sum(len(engine.asked) for engine in some) for some in (engines[:2], engines[2:])] == [1, 1]
        assert (await world.ask("next")).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/v1/completions", {"prompt": "x", "stream": True}, "server_error"),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}, "timeout_error"),
    ],
)
async def test_an_answer_that_takes_too_long_is_504_and_its_replica_is_no_suspect(
    tmp_path: Path, path: str, body: dict[str, Any], kind: str
) -> None:
    config = GatewayConfig(request_timeout_s=0.3)
    async with overload_world(tmp_path, config, hold_s=10.0, requests_per_replica=1) as world:
        engines = [Mortal(delay_s=1.5, light_calls=9) for _ in range(2)]
        for engine in engines:
            await world.add(engine)
        answer = await world.http.post(path, json={"model": "base", **body})
        assert (answer.status_code, answer.headers["x-should-retry"]) == (504, "false")
        assert answer.json()["error"]["type"] == kind and "for 0.3 s" in answer.json()["error"]["message"]
        assert sum(len(engine.asked) for engine in engines) == 1
        # Both replicas count on, and the place is free again.
        assert (world.queue.limit, world.queue.running) == (2, 0)
        for engine in engines:
            engine.die()


async def test_a_requests_own_timeout_extends_request_timeout_s(tmp_path: Path) -> None:
    async with overload_world(tmp_path, GatewayConfig(request_timeout_s=0.2)) as world:
        await world.add(Listening(delay_s=0.6))
        patience = {"x-stainless-read-timeout": "20"}
        asked = [world.ask("x", 1, timeout=20), world.ask("x", 1, stream=True, headers=patience), world.ask("x", 1)]
        assert [(await each).status_code for each in asked] == [200, 200, 504]
        late = await world.ask("x", 1, timeout=0.4)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
