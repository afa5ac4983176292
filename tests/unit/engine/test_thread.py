"""Engine thread: an engine in a loop of its own, with a start that may fail and an end that stops the engine."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable

import pytest

from tandem.engine.echo.engine import EchoEngine
from tandem.engine.thread import EngineThread
from tandem.errors import EngineError


class Recorded(EchoEngine):
    """Records in which thread it starts, and whether it was stopped."""

    thread = ""
    drained = False

    async def start(self) -> None:
        self.thread = threading.current_thread().name

    async def drain(self, timeout_s: float) -> None:
        self.drained = True


def started(engine: EchoEngine) -> tuple[EngineThread, asyncio.Event]:
    stop = asyncio.Event()

    async def work(ready: Callable[[], None]) -> None:
        ready()
        await stop.wait()

    thread = EngineThread(engine, work)
    thread.start().result(10)
    return thread, stop


def test_the_engine_lives_in_the_thread_and_stops_when_the_work_returns() -> None:
    engine = Recorded()
    thread, stop = started(engine)
    assert thread.is_running and engine.thread == "tandem-engine"
    assert thread.submit(asyncio.sleep(0, "done")).result(10) == "done"
    thread.call(stop.set)
    thread.ended.result(10)
    assert engine.drained and not thread.is_running
    # Nothing is left to call.
    thread.call(stop.set)


def test_a_start_that_fails_is_told_to_the_caller_and_ends_the_thread() -> None:
    class Broken(EchoEngine):
        async def start(self) -> None:
            raise EngineError("there are no weights")

    async def never(ready: Callable[[], None]) -> None:
        raise AssertionError("the engine has not started")

    thread = EngineThread(Broken(), never)
    with pytest.raises(EngineError, match="there are no weights"):
        thread.start().result(10)
    thread.ended.result(10)
    assert not thread.is_running


def test_nothing_runs_before_the_start() -> None:
    async def work(ready: Callable[[], None]) -> None:
        ready()

    thread = EngineThread(EchoEngine(), work)
    with pytest.raises(EngineError, match="has not been started"):
        thread.submit(asyncio.sleep(0))
    thread.call(lambda: None)
    with pytest.raises(concurrent.futures.TimeoutError):
        thread.ended.result(0)
