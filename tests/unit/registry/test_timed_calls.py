"""Calls with time-outs: one that hangs delays no later one."""

from __future__ import annotations

import threading

import pytest

from tandem.registry import Registry
from tandem.registry.timed_calls import TimedCalls


async def test_a_call_that_hangs_is_given_up_and_the_next_is_answered(sqlite_registry: Registry) -> None:
    calls, ended = TimedCalls(sqlite_registry, "test"), threading.Event()
    assert await calls.run(5, sqlite_registry.revision) == 0
    with pytest.raises(TimeoutError, match=r"did not answer within 0\.1 s"):
        await calls.run(0.1, ended.wait)
    assert await calls.run(5, sqlite_registry.revision) == 0
    ended.set()
    calls.close()
