"""Learning-rate schedules: warm-up, peak and decay."""

from __future__ import annotations

import pytest

from tandem.config import OptimizerConfig
from tandem.train.schedule import learning_rate


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_is_linear_to_the_peak(schedule: str):
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=10, schedule=schedule)
    assert [learning_rate(config, step, 100) for step in (1, 5, 10)] == pytest.approx([0.01, 0.05, 0.1])


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("cosine", 0.06, 0.02), ("linear", 0.06, 0.02), ("constant", 0.1, 0.1)]
)
def test_the_rate_decays_to_the_final_fraction(schedule: str, middle: float, end: float):
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, schedule=schedule, final_fraction=0.2)
    assert learning_rate(config, 50, 100) == pytest.approx(middle)
    assert learning_rate(config, 100, 100) == pytest.approx(end)


def test_wsd_is_constant_and_decays_linearly_at_the_end():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=10, schedule="wsd", decay_steps=20, final_fraction=0.0)
    rates = [learning_rate(config, step, 100) for step in range(1, 101)]
    assert rates[4] == pytest.approx(0.05) and rates[9:80] == [0.1] * 71
    assert rates[80:] == pytest.approx([0.1 * left / 20 for left in range(19, -1, -1)])


def test_wsd_before_its_decay_is_independent_of_the_number_of_steps():
    config = OptimizerConfig(schedule="wsd", decay_steps=20)
    assert [learning_rate(config, s, 100) for s in range(1, 80)] == [
        learning_rate(config, s, 500) for s in range(1, 80)
    ]


def test_the_rate_never_rises_after_warm_up():
    config = OptimizerConfig(warmup_steps=5)
    rates = [learning_rate(config, step, 60) for step in range(5, 61)]
    assert rates == sorted(rates, reverse=True)
