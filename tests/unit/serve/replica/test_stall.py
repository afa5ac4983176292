from __future__ import annotations

from tandem.engine.protocol import EngineStats
from tandem.serve.replica.stall import StallDetector


def test_an_engine_with_work_that_ends_no_step_is_stuck() -> None:
    progress = StallDetector(10.0)
    progress.observe(EngineStats(running=1, steps=5), 100.0)
    progress.observe(EngineStats(running=1, steps=5), 109.0)
    assert not progress.is_stuck(110.0)
    assert progress.is_stuck(110.5) and progress.idle_s(110.5) == 10.5


def test_waiting_requests_count_as_work() -> None:
    progress = StallDetector(10.0)
    progress.observe(EngineStats(waiting=1, steps=5), 100.0)
    progress.observe(EngineStats(waiting=1, steps=5), 111.0)
    assert progress.is_stuck(111.0)


def test_a_slow_or_idle_engine_is_not_stuck() -> None:
    progress = StallDetector(10.0)
    progress.observe(EngineStats(running=1, steps=5), 100.0)
    progress.observe(EngineStats(running=1, steps=6), 109.0)
    assert not progress.is_stuck(118.0)
    progress.observe(EngineStats(steps=6), 118.0)
    assert not progress.is_stuck(125.0)
    progress.observe(EngineStats(running=1, steps=6), 126.0)
    assert not progress.is_stuck(127.0)


def test_a_stuck_engine_without_requests_is_stuck_until_it_completes_a_step() -> None:
    progress = StallDetector(10.0)
    progress.observe(EngineStats(running=1, steps=5), 100.0)
    progress.observe(EngineStats(steps=5), 111.0)
    assert progress.is_stuck(111.0)
    progress.observe(EngineStats(running=1, steps=5), 113.0)
    assert progress.is_stuck(113.0)
    progress.observe(EngineStats(steps=6), 114.0)
    assert not progress.is_stuck(120.0)


def test_an_idle_engine_that_was_not_observed_for_long_is_not_stuck() -> None:
    progress = StallDetector(10.0)
    progress.observe(EngineStats(steps=5), 100.0)
    # The replica's process was stopped, say.
    progress.observe(EngineStats(steps=5), 200.0)
    assert not progress.is_stuck(200.0)
    progress.observe(EngineStats(running=1, steps=5), 300.0)
    assert not progress.is_stuck(300.0)
    progress.observe(EngineStats(running=1, steps=5), 311.0)
    assert progress.is_stuck(311.0)
