"""Sweep parameters become trials, or are refused before anything starts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.config.training.sweep import is_better, parse_parameter, plan_trials, split_values, trial_config
from tandem.errors import ConfigError

RATE = parse_parameter("optimizer.learning_rate=1e-3,3e-3")
DECAY = parse_parameter("optimizer.weight_decay=loguniform(1e-3,1e-1)")
CONFIG = {"name": "m", "data": {"path": "d"}, "batch_size": 8}


def test_lists_make_a_grid():
    trials = plan_trials([RATE, parse_parameter("seed=1,2")], None)
    assert [tuple(t.values()) for t in trials] == [("1e-3", "1"), ("1e-3", "2"), ("3e-3", "1"), ("3e-3", "2")]


def test_fewer_trials_than_cells_are_a_sample_of_the_grid():
    seeds = parse_parameter(f"seed={','.join(map(str, range(20)))}")
    trials = plan_trials([seeds], 5)
    assert len({t["seed"] for t in trials}) == 5
    assert trials == plan_trials([seeds], 5) != plan_trials([seeds], 5, seed=1)


@given(st.integers(1, 30), st.integers(0, 5))
def test_draws_stay_within_their_range_and_cycle_through_lists(count: int, seed: int):
    trials = plan_trials([RATE, DECAY], count, seed=seed)
    assert len(trials) == count
    assert all(1e-3 <= float(t["optimizer.weight_decay"]) <= 1e-1 for t in trials)
    rates = [t["optimizer.learning_rate"] for t in trials]
    assert abs(rates.count("1e-3") - rates.count("3e-3")) <= 1


def test_a_logarithmic_draw_is_as_often_below_the_middle_as_above():
    drawn = [float(t["optimizer.weight_decay"]) for t in plan_trials([DECAY], 200)]
    assert 70 < sum(value < 1e-2 for value in drawn) < 130


def test_all_trials_are_different():
    whole = parse_parameter("seed=randint(1,3)")
    assert sorted(t["seed"] for t in plan_trials([whole], 3)) == ["1", "2", "3"]
    with pytest.raises(ConfigError, match="only 3 different"):
        plan_trials([whole], 4)


def test_values_are_split_at_commas_outside_of_brackets_and_quotes():
    assert split_values("[0.9, 0.95],[0.9,0.99]") == ["[0.9, 0.95]", "[0.9,0.99]"]
    assert split_values("cosine, 'a,b'") == ["cosine", "'a,b'"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimizer.learning_rate", "not of the form"),
        ("seed=", "not of the form"),
        ("seed=1,,2", "empty value"),
        ("seed=1,1", "1 is there twice"),
        ("name=a,b", "the same for all trials"),
        ("metrics.wandb.project=a,b", "the same for all trials"),
        ("seed=loguniforn(1,2)", "Did you mean 'loguniform'"),
        ("seed=uniform(1)", "takes two numbers"),
        ("seed=randint(0.5,2)", "takes two whole numbers"),
        ("seed=uniform(2,1)", r"low end \(2.0\) must be below the high end \(1.0\)"),
        ("seed=loguniform(0,1)", "starts above 0"),
    ],
)
def test_an_invalid_parameter_is_refused(text: str, said: str):
    with pytest.raises(ConfigError, match=said):
        parse_parameter(text)


@pytest.mark.parametrize(
    ("parameters", "trials", "said"),
    [
        ([], None, "needs something to try"),
        ([RATE, RATE], None, "given twice"),
        ([RATE], 3, "only 2 combinations"),
        ([RATE], 0, "at least 1"),
        ([DECAY], None, "say how many trials"),
    ],
)
def test_an_invalid_plan_is_refused(parameters: list, trials: int | None, said: str):
    with pytest.raises(ConfigError, match=said):
        plan_trials(parameters, trials)


def test_a_trial_is_the_config_with_its_values():
    config = trial_config(CONFIG, {"optimizer.learning_rate": "3e-3", "optimizer.betas": "[0.8, 0.9]", "lora": "null"})
    assert config.optimizer.learning_rate == 0.003
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.batch_size == 8


def test_unknown_keys_and_invalid_values_are_refused():
    with pytest.raises(ConfigError, match="learnin_rate=1.* is not a setting. Did you mean 'learning_rate'"):
        trial_config(CONFIG, {"optimizer.learnin_rate": "1"})
    with pytest.raises(ConfigError, match="The trial accumulate=3 cannot be: .*nearest that works is"):
        trial_config(CONFIG, {"accumulate": "3"})


def test_less_loss_and_more_speed_are_better():
    assert is_better("loss", 1.0, 2.0)
    assert not is_better("loss", 2.0, 1.0)
    assert is_better("tokens_per_s", 2.0, 1.0)
