"""Prepares a sweep: each of its trials an ordinary job, checked and with a folder of its own, before anything starts.

A trial is not registered; the best one is, under the config's name, when all are done. A sweep's id is a hash of its trials, so
the same command goes on where it was, and trials that are finished are not run again.

| event    | fields of a sweep's events                                                                                |
|----------|-----------------------------------------------------------------------------------------------------------|
| sweeping | sweep, trials (how many), parallel (how many at once)                                                     |
| trial    | trial (from 1), job, state, error, and of its newest report: step, steps, loss, tokens_per_s,             |
|          | evaluation_loss, and the metric that trials are compared by                                               |
| swept    | best (from 1), score, job, model (the registered id, or null), scores (a list, null where there is none)  |
| failed   | error                                                                                                     |
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from tandem.config import TrainConfig, from_dict
from tandem.config.check import one_of
from tandem.config.training.sweep import METRICS, Trial, described, trial_config
from tandem.errors import ClusterError, ConfigError
from tandem.ids import job_id
from tandem.jobs.client import JobClient
from tandem.jobs.folder import JobFolder, RunFolder
from tandem.jobs.prepare import NON_CONTENT_KEYS, READER_KEYS, prepare
from tandem.settings import settings
from tandem.storage import write_atomic

TRIAL_ACTOR_CPUS = 0.001
"""CPUs that Ray reserves for the actor that watches a trial."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPlan:
    """All that a sweep's driver needs to know, as sweep.json keeps it."""

    name: str
    """What the best trial is registered as; the config's name."""
    metric: str
    parallel: int
    """Trials at once, if the cluster has room for so many."""
    register: bool
    """Whether the best trial is registered at all."""
    compared: tuple[str, ...]
    """What makes other jobs of the trials, though elsewhere it would not (see `prepare`)."""
    trials: tuple[Trial, ...]
    jobs: tuple[str, ...]
    """The id of each trial's job."""


@dataclass(frozen=True, slots=True)
class SweepFolder(RunFolder):
    """The folder of one sweep."""

    module: ClassVar[str] = "tandem.jobs.tune"

    def plan(self) -> SweepPlan:
        """What is tried."""
        return from_dict(SweepPlan, json.loads((self.path / "sweep.json").read_text()))

    def jobs(self) -> list[JobFolder]:
        """The trials' jobs, in their order."""
        return [JobFolder(settings().jobs_dir / name) for name in self.plan().jobs]

    def swept(self) -> dict[str, Any] | None:
        """The event of its end, if it ended well and the best trial's result is still there."""
        end = self.last("swept", "failed", "sweeping")
        if end is None or end["event"] != "swept":
            return None
        return end if JobFolder(settings().jobs_dir / end["job"]).finished() else None


def prepare_sweep(values: Mapping[str, Any], trials: Sequence[Trial], *, metric: str, parallel: int) -> SweepFolder:
    """Check every trial and write its job's folder, then the sweep's.

    `values` is the config as it was read. Raises ConfigError, DataError, RegistryError or UnknownModelError with what to change.
    """
    one_of("--metric", metric, METRICS)
    if parallel < 1:
        raise ConfigError(f"--parallel is {parallel}; it must be at least 1.")
    configs = [trial_config(values, trial) for trial in trials]
    keys = {key for trial in trials for key in trial}
    compared = tuple(sorted({key.split(".")[0] for key in keys} & {*NON_CONTENT_KEYS}))
    if keys & {f"data.{key}" for key in READER_KEYS}:
        compared = (*compared, "data")
    jobs: dict[str, Trial] = {}
    for trial, config in zip(trials, configs, strict=True):
        job = prepare(replace(config, register=False), compared=compared)
        if job.id in jobs:
            raise ConfigError(
                f"The trials {described(jobs[job.id])} and {described(trial)} are the same job: their values mean the same."
            )
        jobs[job.id] = trial
    name = configs[0].name
    plan = SweepPlan(
        name=name,
        metric=metric,
        parallel=parallel,
        register=configs[0].register,
        compared=compared,
        trials=tuple(trials),
        jobs=tuple(jobs),
    )
    sweep = SweepFolder(settings().sweeps_dir / job_id(f"{name}-sweep", [sorted(jobs), metric]))
    write_atomic(sweep.path / "sweep.json", json.dumps(asdict(plan), indent=1))
    return sweep


def trials_at_once(configs: Sequence[TrainConfig], total: Mapping[str, float], parallel: int) -> int:
    """How many trials run beside each other: at most `parallel`, and no more than the whole cluster has room for.

    Each needs its workers and a task that reads; with less, trials that hold their workers would wait for one another's readers.
    Raises ClusterError if there is no room for the largest one alone.
    """
    fits = parallel
    for name in ("CPU", "GPU"):
        need = max(
            c.parallel.workers * (c.parallel.cpus_per_worker if name == "CPU" else c.parallel.gpus_per_worker)
            + (c.data.readers + TRIAL_ACTOR_CPUS if name == "CPU" else 0.0)
            for c in configs
        )
        there = total.get(name, 0.0)
        if need > there:
            raise ClusterError(
                f"The largest trial needs {need:g} {name}, and the whole cluster has {there:g}. Lower parallel.workers or "
                f"parallel.{name.lower()}s_per_worker, or add a node."
            )
        if need:
            fits = min(fits, math.floor(there / need))
    return fits


def sweep_folders() -> Iterator[SweepFolder]:
    """Every sweep of this home, newest first."""
    folder = settings().sweeps_dir
    if folder.is_dir():
        found = [path for path in folder.iterdir() if (path / "sweep.json").exists()]
        for path in sorted(found, key=lambda p: (p / "sweep.json").stat().st_mtime, reverse=True):
            yield SweepFolder(path)


def find_sweep(sweep_id: str) -> SweepFolder | None:
    """The sweep of that id, or the only one that starts so; None if there is none. `NAME-sweep-` tells it from a job's id."""
    known = list(sweep_folders()) if "-sweep-" in sweep_id else []
    matches = [s for s in known if s.id == sweep_id] or [s for s in known if s.id.startswith(sweep_id)]
    return matches[0] if len(matches) == 1 else None


def stop_sweep(client: JobClient, sweep: SweepFolder, *, timeout_s: float = 30.0) -> None:
    """Stop a sweep's driver and then its trials: a driver that is gone starts no more of them."""
    if submission := client.running(sweep):
        client.stop(submission, timeout_s=timeout_s)
    sweep.mark_stopped()
    stop_trials(client, sweep.jobs(), timeout_s=timeout_s)


def stop_trials(client: JobClient, jobs: Sequence[JobFolder], *, timeout_s: float = 30.0) -> None:
    """Stop those jobs of a sweep that still run: all are told first, then waited for."""
    going_on = [(job, submission) for job in jobs if (submission := client.running(job))]
    for _, submission in going_on:
        client.stop(submission, timeout_s=0.0)
    for job, submission in going_on:
        client.stop(submission, timeout_s=timeout_s)
        job.mark_stopped()
