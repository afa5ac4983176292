"""Slowdown model: how many requests an engine takes beside clients before it is slowed down, learnt from its answers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from tandem.gateway.work.slowdown import FORGOTTEN_AFTER_S, SlowdownModel

Engine = Callable[[float], float]


def cpu(requests: float) -> float:
    """Seconds for a token: each request costs."""
    return 0.003 + 0.0002 * requests


def gpu(requests: float) -> float:
    """Seconds for a token: few requests cost nothing."""
    return max(0.005, 0.00002 * requests)


def observe(model: SlowdownModel, engine: Engine, *counts: float, noise: float = 0.0) -> None:
    rng = random.Random(0)
    for count in counts:
        tokens = 50
        model.observe(count, tokens * engine(count) * (1 + noise * rng.uniform(-1, 1)), tokens, now=0.0)


@pytest.mark.parametrize("clients", [1, 4, 64])
def test_tokens_take_at_most_so_much_longer(clients: int) -> None:
    model = SlowdownModel()
    observe(model, cpu, 2, 30, 250)
    capacity = model.capacity(clients, 1.25, now=0.0)
    assert cpu(clients + capacity) / cpu(clients) == pytest.approx(1.25, rel=0.01)


def test_noise_and_a_pace_that_is_not_linear_slow_no_client_down_by_much_more() -> None:
    for engine in (cpu, gpu):
        model = SlowdownModel()
        observe(
            model,
            engine,
            *[random.Random(1).choice((3, 6, 40, 250)) for _ in range(8)],
            *(3, 6, 40, 250) * 20,
            noise=0.2,
        )
        capacity = min(128, model.capacity(4, 1.25, now=0.0))
        assert capacity >= 2 and engine(4 + capacity) / engine(4) < 1.45


def test_an_engine_that_requests_do_not_slow_down_has_room_for_all() -> None:
    model = SlowdownModel()
    observe(model, lambda requests: 0.005, 1, 8, 64)
    assert model.capacity(4, 1.25, now=0.0) == math.inf


def test_where_nothing_is_known_the_requests_grow_until_something_is() -> None:
    model, running, most = SlowdownModel(), 4.0, []
    for _ in range(12):
        capacity = model.capacity(int(running), 1.25, now=0.0)
        most.append(capacity)
        observe(model, cpu, running + capacity)
    assert most[0] == 1.0, "the first one is alone"
    assert cpu(running + most[-1]) / cpu(running) == pytest.approx(1.25, rel=0.1)


def test_slow_first_answers_of_a_cold_engine_are_corrected() -> None:
    model = SlowdownModel()
    model.observe(2, 100.0, 50, now=0.0)
    observe(model, cpu, 120, 250)
    for _ in range(12):
        observe(model, cpu, 4 + min(128, model.capacity(4, 1.25, now=0.0)))
    capacity = model.capacity(4, 1.25, now=0.0)
    assert cpu(4 + capacity) / cpu(4) < 1.4


def test_what_was_observed_long_ago_counts_no_more() -> None:
    model = SlowdownModel()
    observe(model, cpu, 2, 30, 250)
    assert model.capacity(4, 1.25, now=FORGOTTEN_AFTER_S + 1) == 1.0


def test_answers_without_tokens_are_observed_by_their_seconds() -> None:
    model = SlowdownModel()
    for count in (1, 10):
        model.observe(count, 0.1 * count, 0, now=0.0)
    assert model.capacity(1, 2.0, now=0.0) == pytest.approx(1.0, rel=0.1)
