"""Elastic training: the possible numbers of workers of a run, and its config with each. Pure.

A run with `parallel.workers: {min, max}` keeps whole model-parallel groups and its batch size: fewer workers take more rows
each, in more micro-batches, so that a micro-batch is not larger than configured.
"""

from __future__ import annotations

from dataclasses import replace

from tandem.config.training.job import TrainConfig
from tandem.errors import ConfigError, LayoutError


def worker_counts(config: TrainConfig) -> list[int]:
    """The possible numbers of workers, ascending; of a run that is not elastic the only one."""
    parallel = config.parallel
    min_workers = parallel.workers if parallel.min_workers is None else parallel.min_workers
    return [count for count in range(min_workers, parallel.workers + 1) if _config_with(config, count) is not None]


def with_workers(config: TrainConfig, workers: int) -> TrainConfig:
    """The config of a run with `workers` workers, one of `worker_counts`; LayoutError otherwise."""
    changed = _config_with(config, workers)
    if changed is None:
        raise LayoutError(f"The run cannot have {workers} workers; it can have {_join_counts(worker_counts(config))}.")
    return changed


def with_at_most(config: TrainConfig, workers: int | None) -> TrainConfig:
    """The config of an elastic run that may have `workers` workers at most, and goes on with fewer; None: no other limit.

    One that is not elastic stays as it is. Where `workers` is below the least, the run has the least.
    """
    counts, least = worker_counts(config), config.parallel.min_workers
    if workers is None or least is None or workers >= counts[-1]:
        return config
    most = max((count for count in counts if count <= workers), default=counts[0])
    limited = with_workers(config, most)
    return replace(limited, parallel=replace(limited.parallel, min_workers=least if least < most else None))


def check_elastic(config: TrainConfig) -> None:
    """Raise ConfigError if the run is not possible with `parallel.workers.min` workers."""
    parallel = config.parallel
    if parallel.min_workers is None:
        return
    counts = worker_counts(config)
    if parallel.min_workers not in counts:
        reason = (
            f"each worker of a group of {parallel.group} is needed"
            if parallel.min_workers % parallel.group
            else f"batch_size ({config.batch_size}) cannot be shared out evenly over so many"
        )
        smaller = [n for n in range(1, parallel.min_workers) if _config_with(config, n) is not None]
        possible_counts = sorted({*counts, *smaller[-1:]})
        raise ConfigError(
            f"parallel.workers.min is {parallel.min_workers}, but {reason}. Set it to one of {_join_counts(possible_counts)}."
        )


def _config_with(config: TrainConfig, workers: int) -> TrainConfig | None:
    planned = config.parallel
    if workers == planned.workers:
        return replace(config, parallel=replace(planned, min_workers=None)) if planned.min_workers else config
    try:
        parallel = replace(planned, workers=workers, min_workers=None)
    except LayoutError:
        return None
    if config.batch_size % parallel.data:
        return None
    rows = config.batch_size // parallel.data
    largest = config.batch_size // (planned.data * config.accumulate)
    accumulate = next(n for n in range(config.accumulate, rows + 1) if rows % n == 0 and rows // n <= largest)
    return replace(config, parallel=parallel, accumulate=accumulate)


def _join_counts(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
