"""A body on which engines died takes two replicas at most, over all requests that have it: real HTTP on both sides, no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from overload_world import ROUTE, Listening, Mortal, World, overload_world

from tandem.auth import KeyStore
from tandem.config import GatewayConfig
from tandem.gateway.requests import quarantine as module
from tandem.gateway.requests.quarantine import Quarantine, body_digest
from tandem.registry import Registry


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_replicas_lost_with_a_body_are_counted_once_each_and_forgotten_after_a_time() -> None:
    clock = Clock()
    kept = Quarantine(300.0, clock)
    one, other = body_digest("/a", b"x"), body_digest("/b", b"x")
    for replica in ("r1", "r1", "r2"):
        kept.replica_lost(one, replica)
    assert (kept.lost_replicas(one), kept.lost_replicas(other)) == (2, 0)
    clock.now = 299.0
    assert kept.lost_replicas(one) == 2
    clock.now = 301.0
    assert kept.lost_replicas(one) == 0
    kept.replica_lost(one, "r3")
    assert kept.lost_replicas(one) == 1


def test_a_whole_answer_clears_a_body_and_old_ones_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 3)
    kept = Quarantine(300.0, Clock())
    kept.replica_lost(b"a", "r1")
    kept.answered(b"a")
    assert kept.lost_replicas(b"a") == 0
    for digest in (b"a", b"b", b"c", b"d"):
        kept.replica_lost(digest, "r1")
    assert [kept.lost_replicas(digest) for digest in (b"a", b"b", b"d")] == [0, 1, 1]


def test_with_0_seconds_nothing_is_remembered() -> None:
    kept = Quarantine(0.0, Clock())
    kept.replica_lost(b"a", "r1")
    assert kept.lost_replicas(b"a") == 0


async def mortals(world: World, count: int) -> list[Mortal]:
    engines = [Mortal() for _ in range(count)]
    for engine in engines:
        await world.add(engine)
    return engines


@pytest.mark.parametrize("stream", [False, True])
async def test_a_body_that_killed_two_engines_is_422_and_reaches_no_third(tmp_path: Path, stream: bool) -> None:
    async with overload_world(tmp_path, hold_s=10.0) as world:
        engines = await mortals(world, 4)
        assert (await world.ask("poison", 1, stream=stream)).status_code == 503
        for _ in range(3):
            refused = await world.ask("poison", 1, stream=stream)
            error = refused.json()["error"]
            assert refused.status_code == 422 and error["code"] == "request_quarantined", refused.text
            assert refused.headers["x-should-retry"] == "false" and "2 replicas" in error["message"]
        assert sorted(len(engine.asked) for engine in engines) == [0, 0, 1, 1]
        # Of the same length and route, another body.
        assert (await world.ask("healthy", 1, stream=stream)).status_code == 200


async def test_without_a_quarantine_the_next_request_takes_two_more(tmp_path: Path) -> None:
    async with overload_world(tmp_path, GatewayConfig(quarantine_s=0.0), hold_s=10.0) as world:
        engines = await mortals(world, 4)
        assert [(await world.ask("poison", 1)).status_code for _ in range(2)] == [503, 503]
        assert sorted(len(engine.asked) for engine in engines) == [1, 1, 1, 1]


async def test_a_request_whose_replica_was_lost_for_another_one_is_answered_by_the_next(tmp_path: Path) -> None:
    async with overload_world(tmp_path, hold_s=10.0, requests_per_replica=8) as world:
        dying = Mortal(delay_s=0.02)
        await world.add(dying)
        beside = [world.ask("beside", 30) for _ in range(3)]
        await world.until(lambda: len(dying.asked) == 3)
        await world.hosts[0].drain(0)
        await world.add(Listening())
        assert [(await each).status_code for each in beside] == [200] * 3
        assert (await world.ask("beside", 30)).status_code == 200


class DiesLate(Listening):
    """Dies after the first token of `late`, and says so in its stream, as vLLM does."""

    async def _stream(
        self, head: dict[str, Any], tokens: list[str], usage: dict[str, int] | None, *, chat: bool
    ) -> AsyncIterator[bytes]:
        async for event in super()._stream(head, tokens, usage, chat=chat):
            yield event
            if tokens[0] == "late":
                self.die()
                yield b'data: {"error": {"message": "EngineCore has died", "code": 500}}\n\n'
                return


async def test_an_engine_that_dies_in_the_middle_of_a_stream_counts_too(tmp_path: Path) -> None:
    async with overload_world(tmp_path, hold_s=0.0) as world:
        for _ in range(3):
            await world.add(DiesLate())
        quarantine = world.app.state.relay.quarantine

        def most_losses() -> int:
            return max(map(quarantine.lost_replicas, list(quarantine._lost)), default=0)

        for count in (1, 2):
            broken = await world.ask("late", 5, stream=True)
            assert broken.status_code == 200 and "error" in broken.text
            # Until the gateway has asked the replica.
            await world.until(lambda count=count: most_losses() == count)
        assert (await world.ask("late", 5, stream=True)).status_code == 422
        assert (await world.ask("other", 5, stream=True)).text.endswith("data: [DONE]\n\n")


async def test_a_request_that_an_engine_refuses_is_not_remembered(tmp_path: Path) -> None:
    async with overload_world(tmp_path) as world:
        await world.add(Listening())
        for _ in range(3):
            refused = await world.http.post(ROUTE, json={"model": "base", "prompt": "x " * 20_000})
            assert refused.status_code == 400


async def test_a_body_that_killed_two_engines_is_refused_for_other_tenants_too(tmp_path: Path) -> None:
    async with overload_world(tmp_path, hold_s=10.0) as world:
        engines = await mortals(world, 4)
        store = KeyStore.at(Registry(f"sqlite:///{tmp_path}/tandem.db").address)
        keys = [store.create(name, tenant=name, by="ann").secret for name in ("lab", "shop")]
        headers = [{"x-api-key": secret} for secret in keys]
        for each in headers:
            while (await world.http.get("/v1/models", headers=each)).status_code != 200:
                await asyncio.sleep(0.05)
        while (await world.http.get("/v1/models")).status_code != 401:
            await asyncio.sleep(0.05)
        assert [(await world.ask("poison", 1, headers=each)).status_code for each in headers] == [503, 422]
        assert sorted(len(engine.asked) for engine in engines) == [0, 0, 1, 1]
