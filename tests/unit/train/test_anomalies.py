"""Non-finite steps and loss spikes are detected."""

from __future__ import annotations

import pytest

from tandem.config import SpikeConfig
from tandem.errors import JobError
from tandem.train.anomalies import NonFiniteGuard, SpikeDetector


def test_nonfinite_steps_in_a_row_end_the_run_with_the_rows_in_the_error():
    counted = NonFiniteGuard(2)
    assert counted.record_skipped(5, 32, 8, []).in_a_row == 1
    counted.check()
    counted.record_taken()
    counted.record_skipped(7, 48, 8, [50, 51])
    counted.check()
    assert counted.record_skipped(8, 56, 8, []).in_a_row == 2
    with pytest.raises(
        JobError, match=r"2 steps in a row.*step 7 \(rows 48 to 55; .* among 50, 51\); step 8 \(rows 56 to 63\)"
    ):
        counted.check()


def test_a_spike_is_measured_against_a_full_window_of_losses():
    found = SpikeDetector(SpikeConfig(factor=2, window=3))
    assert [found.median_exceeded_by(loss) for loss in (9.0, 1.0, 1.0, 1.9)] == [None] * 4
    assert found.median_exceeded_by(2.1) == 1.0
    # It is not among those that the next is held to.
    assert found.median_exceeded_by(2.1) == 1.0
