"""What becomes of calls that a replica refused, broke off or died of: real HTTP on both sides, no Ray."""

from __future__ import annotations

import asyncio
from pathlib import Path

from overload_world import Listening, Mortal, overload_world

COUNT = {"model": "base", "prompt": "x"}


async def test_light_calls_that_lose_their_replica_are_answered_by_the_next_and_nobody_waits_for_ever(
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


async def test_who_waited_longer_than_hold_s_for_room_and_then_met_a_lost_replica_waits_for_the_next(
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
