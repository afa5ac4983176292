"""Pace: how many requests an engine takes beside clients before it is slowed down, learnt from its answers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from tandem.gateway.work.pace import FORGOTTEN_AFTER_S, Pace

Engine = Callable[[float], float]


def cpu(requests: float) -> float:
    """Seconds for a token: each request costs."""
    return 0.003 + 0.0002 * requests


def gpu(requests: float) -> float:
    """Seconds for a token: few requests cost nothing."""
    return max(0.005, 0.00002 * requests)


def observe(pace: Pace, engine: Engine, *counts: float, noise: float = 0.0) -> None:
    rng = random.Random(0)
    for count in counts:
        tokens = 50
        pace.observe(count, tokens * engine(count) * (1 + noise * rng.uniform(-1, 1)), tokens, now=0.0)


@pytest.mark.parametrize("clients", [1, 4, 64])
def test_tokens_take_at_most_so_much_longer(clients: int) -> None:
    pace = Pace()
    observe(pace, cpu, 2, 30, 250)
    room = pace.room(clients, 1.25, now=0.0)
    assert cpu(clients + room) / cpu(clients) == pytest.approx(1.25, rel=0.01)


def test_noise_and_a_pace_that_is_not_linear_slow_no_client_down_by_much_more() -> None:
    for engine in (cpu, gpu):
        pace = Pace()
        observe(
            pace,
            engine,
            *[random.Random(1).choice((3, 6, 40, 250)) for _ in range(8)],
            *(3, 6, 40, 250) * 20,
            noise=0.2,
        )
        room = min(128, pace.room(4, 1.25, now=0.0))
        assert room >= 2 and engine(4 + room) / engine(4) < 1.45


def test_an_engine_that_requests_do_not_slow_down_has_room_for_all() -> None:
    pace = Pace()
    observe(pace, lambda requests: 0.005, 1, 8, 64)
    assert pace.room(4, 1.25, now=0.0) == math.inf


def test_where_nothing_is_known_the_requests_grow_until_something_is() -> None:
    pace, running, most = Pace(), 4.0, []
    for _ in range(12):
        room = pace.room(int(running), 1.25, now=0.0)
        most.append(room)
        observe(pace, cpu, running + room)
    assert most[0] == 1.0, "the first one is alone"
    assert cpu(running + most[-1]) / cpu(running) == pytest.approx(1.25, rel=0.1)


def test_slow_first_answers_of_a_cold_engine_are_corrected() -> None:
    pace = Pace()
    pace.observe(2, 100.0, 50, now=0.0)
    observe(pace, cpu, 120, 250)
    for _ in range(12):
        observe(pace, cpu, 4 + min(128, pace.room(4, 1.25, now=0.0)))
    room = pace.room(4, 1.25, now=0.0)
    assert cpu(4 + room) / cpu(4) < 1.4


def test_what_was_observed_long_ago_counts_no_more() -> None:
    pace = Pace()
    observe(pace, cpu, 2, 30, 250)
    assert pace.room(4, 1.25, now=FORGOTTEN_AFTER_S + 1) == 1.0


def test_answers_without_tokens_are_observed_by_their_seconds() -> None:
    pace = Pace()
    for count in (1, 10):
        pace.observe(count, 0.1 * count, 0, now=0.0)
    assert pace.room(1, 2.0, now=0.0) == pytest.approx(1.0, rel=0.1)
