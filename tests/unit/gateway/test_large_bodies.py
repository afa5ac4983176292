"""Large bodies take turns on the event loop; small ones and other tasks go on between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

from overload_world import ROUTE, Listening, overload_world

from tandem.api.bounded_json import size_steps
from tandem.gateway.requests.large_bodies import LARGE_BYTES, TURN_BYTES, LargeBodies

LARGE = LARGE_BYTES + 1


async def test_large_bodies_are_worked_on_one_at_a_time_and_small_ones_at_once() -> None:
    turns, order = LargeBodies(), list[str]()

    def work(name: str, seconds: float = 0.0) -> str:
        order.append(f"{name} begins")
        time.sleep(seconds)
        order.append(f"{name} ends")
        return name

    async def large(name: str) -> str:
        return await turns.run(LARGE, work, name, 0.02)

    asked = [asyncio.create_task(large(name)) for name in "abc"]
    await asyncio.sleep(0)
    assert await turns.run(10, work, "small") == "small"
    # The first has had its turn, the others wait while it rests.
    assert order == ["a begins", "a ends", "small begins", "small ends"]
    assert [await each for each in asked] == ["a", "b", "c"]
    assert order[4:] == ["b begins", "b ends", "c begins", "c ends"]


async def test_bodies_of_middle_size_are_worked_on_one_in_a_round_of_the_loop() -> None:
    turns, rounds, now = LargeBodies(), list[int](), 0

    async def count() -> None:
        nonlocal now
        while len(rounds) < 3:
            now += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await asyncio.gather(*(turns.run(TURN_BYTES + 1, lambda: rounds.append(now)) for _ in range(3)))
    await counting
    assert len(set(rounds)) == 3


async def test_other_tasks_run_between_the_steps_of_a_large_body_and_not_of_a_small_one() -> None:
    async def interleaved(size: int) -> int:
        turns, ticks, done = LargeBodies(), 0, False

        def steps() -> Iterator[None]:
            for _ in range(10):
                time.sleep(0.005)
                yield

        async def tick() -> None:
            nonlocal ticks
            while not done:
                ticks += 1
                await asyncio.sleep(0)

        beside = asyncio.create_task(tick())
        await asyncio.sleep(0)
        await turns.run_steps(size, steps())
        done, seen = True, ticks
        await beside
        return seen

    assert await interleaved(LARGE) >= 10
    assert await interleaved(10) <= 2


async def test_a_failure_or_a_client_that_leaves_gives_the_turn_to_the_next() -> None:
    turns = LargeBodies()

    def fail() -> None:
        raise ValueError("it is no JSON")

    failing = asyncio.create_task(turns.run(LARGE, fail))
    leaving = asyncio.create_task(turns.run_steps(LARGE, iter([None] * 3)))
    await asyncio.sleep(0)
    leaving.cancel()
    assert await asyncio.wait_for(turns.run(LARGE, lambda: 7), 5) == 7
    assert isinstance((await asyncio.gather(failing, return_exceptions=True))[0], ValueError)


def test_a_body_is_counted_in_pieces_and_one_above_the_budget_no_further() -> None:
    assert len(list(size_steps(b'{"prompt": "' + b"x" * 2**21 + b'"}'))) == 33
    steps = 0
    try:
        for _ in size_steps(b'{"a":[' + b"{}," * 2**19 + b"{}]}"):
            steps += 1
    except ValueError:
        pass
    assert 1 < steps < 10


async def test_large_and_small_requests_are_answered_side_by_side(tmp_path: Path) -> None:
    async with overload_world(tmp_path) as world:
        await world.add(Listening())
        large = [
            asyncio.create_task(world.http.post(ROUTE, json={"model": "base", "prompt": f"{n} " + "x" * 10**6}))
            for n in range(6)
        ]
        small = [world.ask(f"small{n}") for n in range(6)]
        assert {(await each).status_code for each in [*large, *small]} == {200}
