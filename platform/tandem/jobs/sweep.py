"""Sweeps: preparation of the trials, each an ordinary job with its own folder, and the sweep's folder.

Trials are not registered; the best one is, under the config's name, at the end. A sweep's id is a hash of its trials, so the same
command continues it, and finished trials are not run again. Its events are `SweepStarted`, `TrialReported`, `SweepFinished` and
`Failed` of `tandem.observability.events`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from tandem.config import TrainConfig, from_dict
from tandem.config.check import one_of
from tandem.config.training.sweep import METRICS, Trial, describe_trial, trial_config
from tandem.errors import ClusterError, ConfigError
from tandem.ids import job_id
from tandem.jobs.client import JobClient
from tandem.jobs.folder import JobFolder, RunFolder
from tandem.jobs.prepare import NON_CONTENT_KEYS, READER_KEYS, prepare
from tandem.observability.events import Evaluated, Event, Failed, Step, SweepFinished, SweepStarted
from tandem.settings import settings
from tandem.storage import write_atomic

TRIAL_ACTOR_CPUS = 0.001
"""CPUs that Ray reserves for the actor that follows a trial."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPlan:
    """Input of a sweep's driver, stored in sweep.json."""

    name: str
    """Name that the best trial is registered under: the config's."""
    metric: str
    parallel: int
    """Trials at a time, at most."""
    register: bool
    """Whether the best trial is registered at all."""
    compared: tuple[str, ...]
    """Keys that distinguish the jobs of the trials although they are not part of an ordinary job's id (see `prepare`)."""
    trials: tuple[Trial, ...]
    jobs: tuple[str, ...]
    """The id of each trial's job."""


@dataclass(frozen=True, slots=True)
class SweepFolder(RunFolder):
    """Folder of one sweep."""

    module: ClassVar[str] = "tandem.jobs.tune"

    def plan(self) -> SweepPlan:
        """The sweep's plan."""
        return from_dict(SweepPlan, json.loads((self.path / "sweep.json").read_text()))

    def jobs(self) -> list[JobFolder]:
        """The trials' jobs, in their order."""
        return [JobFolder(settings().jobs_dir / name) for name in self.plan().jobs]

    def finished(self) -> SweepFinished | None:
        """The event of the sweep's end, if it succeeded and the best trial's result exists."""
        end: Event | None = self.last(SweepFinished, Failed, SweepStarted)
        if not isinstance(end, SweepFinished):
            return None
        return end if JobFolder(settings().jobs_dir / end.job).finished() else None


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
                f"The trials {describe_trial(jobs[job.id])} and {describe_trial(trial)} are the same job: "
                "their values mean the same."
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


def score(metric: str, events: Iterable[Event]) -> float | None:
    """A trial's value of a metric, from its events; None without a finite value.

    The last value of losses and memory; the median of metrics that vary from step to step.
    """
    if metric in ("evaluation_loss", "perplexity"):
        key = metric.removeprefix("evaluation_")
        raw_values: list[Any] = [event.measured.get(key) for event in events if isinstance(event, Evaluated)]
    else:
        raw_values = [getattr(event, metric, None) for event in events if isinstance(event, Step)]
    values = [float(value) for value in raw_values if isinstance(value, int | float)]
    if not values:
        return None
    value = sorted(values)[len(values) // 2] if METRICS[metric] == "max" else values[-1]
    return value if math.isfinite(value) else None


def trials_at_once(configs: Sequence[TrainConfig], cluster_resources: Mapping[str, float], parallel: int) -> int:
    """Number of concurrent trials: at most `parallel`, and as many as the empty cluster can hold.

    Each needs its workers and a task that reads data; with less, trials that hold their workers would wait for each other's
    readers. Raises ClusterError if the largest trial does not fit alone.
    """
    num_trials = parallel
    for name in ("CPU", "GPU"):
        required = max(
            config.parallel.workers
            * (config.parallel.cpus_per_worker if name == "CPU" else config.parallel.gpus_per_worker)
            + (config.data.readers + TRIAL_ACTOR_CPUS if name == "CPU" else 0.0)
            for config in configs
        )
        available = cluster_resources.get(name, 0.0)
        if required > available:
            raise ClusterError(
                f"The largest trial needs {required:g} {name}, and the whole cluster has {available:g}. "
                f"Lower parallel.workers or parallel.{name.lower()}s_per_worker, or add a node."
            )
        if required:
            num_trials = min(num_trials, math.floor(available / required))
    return num_trials


def sweep_folders() -> Iterator[SweepFolder]:
    """All sweeps in TANDEM_HOME, newest first."""
    folder = settings().sweeps_dir
    if folder.is_dir():
        paths = [path for path in folder.iterdir() if (path / "sweep.json").exists()]
        for path in sorted(paths, key=lambda p: (p / "sweep.json").stat().st_mtime, reverse=True):
            yield SweepFolder(path)


def find_sweep(sweep_id: str) -> SweepFolder | None:
    """The sweep of that id, or the only one with that prefix; None without one. Ids of sweeps contain `-sweep-`."""
    sweeps = list(sweep_folders()) if "-sweep-" in sweep_id else []
    matches = [sweep for sweep in sweeps if sweep.id == sweep_id] or [
        sweep for sweep in sweeps if sweep.id.startswith(sweep_id)
    ]
    return matches[0] if len(matches) == 1 else None


def stop_sweep(client: JobClient, sweep: SweepFolder, *, timeout_s: float = 30.0) -> None:
    """Stop a sweep's driver, which then starts no more trials, and then its trials."""
    if submission := client.running(sweep):
        client.stop(submission, timeout_s=timeout_s)
    sweep.mark_stopped()
    stop_trials(client, sweep.jobs(), timeout_s=timeout_s)


def stop_trials(client: JobClient, jobs: Sequence[JobFolder], *, timeout_s: float = 30.0) -> None:
    """Stop the running jobs of a sweep: request all stops first, then wait for each."""
    running = [(job, submission) for job in jobs if (submission := client.running(job))]
    for _, submission in running:
        client.stop(submission, timeout_s=0.0)
    for job, submission in running:
        client.stop(submission, timeout_s=timeout_s)
        job.mark_stopped()
