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
