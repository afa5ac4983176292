"""Driver of a sweep: `python -m tandem.jobs.tune SWEEP_DIR`, the entry point of a Ray job.

Ray Tune schedules the trials. A trial is a small actor that submits an ordinary training job, follows its log and reports its
metrics; the job's own workers train. So a trial can be watched, stopped and inspected like any job, and a job that outlives its
sweep is joined by the next run of that sweep.
"""

from __future__ import annotations

import logging
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import tune

from tandem.cluster.local import Cluster, connect, running_cluster
from tandem.errors import ClusterError, JobError, TandemError
from tandem.jobs.client import JobClient
from tandem.jobs.folder import JobFolder, JobState
from tandem.jobs.sweep import TRIAL_ACTOR_CPUS, SweepFolder, SweepPlan, stop_trials, trials_at_once
from tandem.jobs.sweep_result import failure_reason, finish_sweep
from tandem.observability.codec import decode_event, to_json
from tandem.observability.events import (
    Evaluated,
    Event,
    Failed,
    Step,
    SweepStarted,
    TrialReported,
)
from tandem.observability.journal import Journal
from tandem.settings import export as export_variables

REPORT_EVERY_S = 1.0
"""Seconds between a trial's reports: a step may take milliseconds, and each report costs the driver a round."""


def main(arguments: list[str]) -> int:
    """Run the sweep in the folder named by the only argument; returns the exit status."""
    if len(arguments) != 1:
        print("usage: python -m tandem.jobs.tune SWEEP_DIR", file=sys.stderr)
        return 2
    sweep = SweepFolder(Path(arguments[0]).expanduser().resolve())
    journal = Journal(sweep.path / "events.jsonl")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run_sweep(sweep, journal)
        return 0
    except TandemError as error:
        journal.write(Failed(error=str(error)))
        return error.exit_code
    except Exception as error:
        logging.getLogger(__name__).exception("The sweep failed with an unexpected error.")
        journal.write(Failed(error=f"{type(error).__name__}: {error}"))
        return 1


def run_sweep(sweep: SweepFolder, journal: Journal) -> None:
    """Run all trials that are not finished, and register the best. JobError if none has a value of the metric."""
    plan, jobs = sweep.plan(), sweep.jobs()
    cluster = own_cluster(sweep)
    # No files and tables of Tune's: the sweep has its own.
    export_variables({"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"})
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    ray.init(address=cluster.address or "auto", logging_level=logging.WARNING, ignore_reinit_error=True)
    at_once = trials_at_once([job.config() for job in jobs], ray.cluster_resources(), plan.parallel)
    journal.write(SweepStarted(sweep=sweep.id, trials=len(jobs), parallel=at_once))
    storage = sweep.path / ".ray"
    tuner = tune.Tuner(
        # The job's workers request their own resources, but Tune accepts no trial without any.
        tune.with_resources(run_trial, {"CPU": TRIAL_ACTOR_CPUS}),
        param_space={
            "trial": tune.grid_search(list(range(len(jobs)))),
            "jobs": [str(job.path) for job in jobs],
            "cluster": {"dashboard_url": cluster.dashboard_url, "local": cluster.local},
        },
        tune_config=tune.TuneConfig(max_concurrent_trials=at_once),
        run_config=tune.RunConfig(
            name=sweep.id, storage_path=str(storage), verbose=0, callbacks=[JournalCallback(journal.path, jobs, plan)]
        ),
    )
    try:
        tuner.fit()
    finally:
        stop_trials(JobClient(cluster), jobs, timeout_s=0.0)
        shutil.rmtree(storage, ignore_errors=True)
    finish_sweep(sweep, journal)


def own_cluster(sweep: SweepFolder) -> Cluster:
    """The cluster that runs this process as a job; ClusterError if there is none."""
    local, submissions = running_cluster(), sweep.submissions()
    # Trials then run with the same Python as the sweep.
    if local is not None and submissions and submissions[-1]["dashboard_url"] == local.dashboard_url:
        return local
    cluster = connect()
    if cluster is None:
        raise ClusterError("A sweep's driver runs on a cluster: `tandem train sweep` submits it.")
    return cluster


def run_trial(params: Mapping[str, Any]) -> None:
    """Run one trial, in an actor of Tune's: submit or join its job, and report until it ends. JobError if it fails."""
    job = JobFolder(Path(params["jobs"][params["trial"]]))
    newest_events: dict[type[Event], Event] = {}
    if not job.finished():
        client = JobClient(Cluster(**params["cluster"]))
        submission = client.submit(job)
        last_report_at = -REPORT_EVERY_S
        for line in client.follow_resubmitted(job, submission):
            event = decode_event(line)
            if event is None:
                continue
            newest_events[type(event)] = event
            if isinstance(event, Step) and time.monotonic() - last_report_at >= REPORT_EVERY_S:
                last_report_at = time.monotonic()
                tune.report(reported_metrics(newest_events))
        if not job.finished():
            failed = newest_events.get(Failed)
            raise JobError((failed.error if isinstance(failed, Failed) else "") or client.message(submission))
    tune.report(reported_metrics({type(event): event for event in job.typed_events()}))


def reported_metrics(newest_events: Mapping[type[Event], Event]) -> dict[str, float]:
    """The metrics of a job's newest Step and Evaluated, which `newest_events` holds by kind."""
    numbers = to_json(newest_events[Step]) if Step in newest_events else {}
    if isinstance(evaluation := newest_events.get(Evaluated), Evaluated):
        numbers |= {
            "evaluation_loss": evaluation.measured.get("loss"),
            "perplexity": evaluation.measured.get("perplexity"),
        }
    # Tune reports a `time` of its own.
    return {key: value for key, value in numbers.items() if isinstance(value, int | float) and key != "time"}


class JournalCallback(tune.Callback):
    """Writes the state of Tune's trials to the sweep's journal, in the driver."""

    def __init__(self, journal: Path, jobs: list[JobFolder], plan: SweepPlan) -> None:
        # A path, not a Journal: Tune pickles its callbacks, and a lock cannot be pickled.
        self._journal, self._jobs, self._metric = journal, jobs, plan.metric

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial starts."""
        self._write(trial, JobState.PENDING, {})

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial reported metrics."""
        self._write(trial, JobState.RUNNING, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial finished."""
        self._write(trial, JobState.FINISHED, trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed; the others continue."""
        reason = failure_reason(self._jobs[int(trial.config["trial"])])
        self._write(trial, JobState.FAILED, trial.last_result or {}, error=reason)

    def _write(self, trial: Any, state: JobState, result: Mapping[str, Any], error: str | None = None) -> None:
        number = int(trial.config["trial"])
        shown_keys = ("step", "steps", "loss", "tokens_per_s", "evaluation_loss", self._metric)
        numbers = {key: result[key] for key in shown_keys if isinstance(result.get(key), int | float)}
        Journal(self._journal).write(
            TrialReported(trial=number + 1, job=self._jobs[number].id, state=str(state), error=error, numbers=numbers)
        )


if __name__ == "__main__":
    # Imported by name: Tune's actors unpickle objects of this module, and cannot import __main__.
    from tandem.jobs.tune import main as named_main

    sys.exit(named_main(sys.argv[1:]))
