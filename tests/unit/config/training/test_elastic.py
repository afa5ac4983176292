"""Limits of an elastic run's number of workers."""

from __future__ import annotations

import pytest

from tandem.config import DataConfig, ParallelismConfig, TrainConfig, with_at_most, worker_counts


def config(workers: int, min_workers: int | None) -> TrainConfig:
    parallel = ParallelismConfig(workers=workers, min_workers=min_workers)
    return TrainConfig(name="x", data=DataConfig(path="/d"), batch_size=12, parallel=parallel)


@pytest.mark.parametrize(
    ("most", "counts"),
    [(None, [2, 3, 4, 6]), (9, [2, 3, 4, 6]), (6, [2, 3, 4, 6]), (5, [2, 3, 4]), (3, [2, 3]), (2, [2]), (1, [2])],
)
def test_a_limited_run_takes_no_more_workers_and_still_goes_on_with_fewer(most: int | None, counts: list[int]) -> None:
    limited = with_at_most(config(6, 2), most)
    assert worker_counts(limited) == counts
    assert limited.batch_size == 12


def test_a_run_that_is_not_elastic_has_no_limit() -> None:
    assert with_at_most(config(4, None), 1) == config(4, None)
