"""Hyperparameters that a client leaves to the platform, and the steps that follow."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.jobs.fine_tuning.hyperparameters import MAX_AUTO_EPOCHS, choose, plan
from tandem.jobs.fine_tuning.spec import Hyperparameters, result_name

AUTO = Hyperparameters()


@pytest.mark.parametrize(
    ("examples", "epochs", "batch_size"), [(1, 25, 1), (10, 10, 1), (100, 3, 1), (5_000, 3, 10), (20_000, 1, 40)]
)
def test_automatic_hyperparameters_follow_the_number_of_examples(examples: int, epochs: int, batch_size: int) -> None:
    chosen = choose(AUTO, examples)
    assert (chosen.n_epochs, chosen.batch_size, chosen.learning_rate_multiplier) == (epochs, batch_size, 1.0)


def test_requested_hyperparameters_are_taken() -> None:
    chosen = choose(Hyperparameters(batch_size=8, learning_rate_multiplier=0.5, n_epochs=7, beta=0.3), 100)
    assert (chosen.batch_size, chosen.learning_rate_multiplier, chosen.n_epochs, chosen.beta) == (8, 0.5, 7, 0.3)
    # A batch has at most all examples.
    assert choose(Hyperparameters(batch_size=64), 10).batch_size == 10


@given(examples=st.integers(1, 10**6), share=st.floats(0.01, 1.0), workers=st.integers(1, 64))
def test_every_plan_sees_each_row_once_an_epoch_on_whole_batches(examples: int, share: float, workers: int) -> None:
    rows = max(1, int(examples * share))
    chosen = choose(AUTO, examples)
    planned = plan(chosen, examples=examples, rows=rows, workers=workers)
    assert 1 <= chosen.n_epochs <= MAX_AUTO_EPOCHS and planned.batch_rows % workers == 0
    assert planned.steps == math.ceil(chosen.n_epochs * rows / planned.batch_rows)
    assert planned.steps * planned.batch_rows >= chosen.n_epochs * rows


def test_the_results_name_tells_base_tenant_suffix_and_job() -> None:
    assert result_name("org/base@3", "red", "my-model", "ftjob-0123456789", 96) == "ft:base:red:my-model:01234567"
    assert result_name("base", "red", None, "ftjob-0123456789", 96) == "ft:base:red::01234567"
    long = result_name("b" * 90, "red", "s" * 64, "ftjob-0123456789", 96)
    assert len(long) == 96 and long.startswith("ft:b") and long.endswith(":01234567")
