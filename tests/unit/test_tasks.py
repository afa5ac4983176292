"""Ends of tasks: awaited, and with the errors that their owners have to hear of."""

from __future__ import annotations

import asyncio

import pytest

from tandem.tasks import discard, stop


async def test_a_stopped_task_has_ended() -> None:
    task = asyncio.create_task(asyncio.sleep(60))
    await stop(task)
    await stop(None)
    assert task.cancelled()


async def test_a_task_that_had_failed_is_told_by_stop_and_not_by_discard() -> None:
    async def fail() -> None:
        raise ValueError("broken")

    tasks = [asyncio.create_task(fail()) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="broken"):
        await stop(tasks[0])
    await discard(tasks[1])
