"""The driver of a sweep: `python -m tandem.jobs.tune SWEEP_DIR`, which is what a Ray job runs.

Ray Tune decides which trial runs when. A trial is a small actor that submits its job as anybody would and reports what the job's
log tells; the work is done by the job's own workers. So a trial is watched, stopped and looked into like any job, and a job
that outlives its sweep is joined again by the next.
"""

from __future__ import annotations

import logging
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune

from tandem.cluster.local import Cluster, connect, running
from tandem.config.training.sweep import better, score
from tandem.errors import ClusterError, JobError, TandemError
from tandem.jobs.client import JobClient
from tandem.jobs.folder import JobFolder, JobState
from tandem.jobs.prepare import prepare
from tandem.jobs.sweep import TRIAL_ACTOR_CPUS, SweepFolder, SweepPlan, stop_trials, trials_at_once
from tandem.observability import events
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
        journal.write({"event": "failed", "error": str(error)})
        return error.exit_code
    except Exception as error:
        logging.getLogger(__name__).exception("The sweep failed in a way that Tandem does not know.")
        journal.write({"event": "failed", "error": f"{type(error).__name__}: {error}"})
        return 1


def run_sweep(sweep: SweepFolder, journal: Journal) -> None:
    """Run all trials that are not finished, and register the best. JobError if none has a value of the metric."""
    plan, jobs = sweep.plan(), sweep.jobs()
    cluster = own_cluster(sweep)
    # Tune's own files and tables: the sweep's folder and table are ours.
    export_variables({"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"})
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    ray.init(address=cluster.address or "auto", logging_level=logging.WARNING, ignore_reinit_error=True)
    at_once = trials_at_once([job.config() for job in jobs], ray.cluster_resources(), plan.parallel)
    journal.write({"event": "sweeping", "sweep": sweep.id, "trials": len(jobs), "parallel": at_once})
    storage = sweep.path / ".ray"
    tuner = tune.Tuner(
        # The job's workers ask for what they need themselves; but Tune takes no trial that needs nothing.
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
    scores = [score(plan.metric, job.events()) if job.finished() else None for job in jobs]
    best = best_of(plan.metric, scores)
    if best is None:
        failed = [job for job in jobs if not job.finished()]
        raise JobError(
            f"None of the {len(jobs)} trials has a {plan.metric} to compare. "
            + (
                f"{len(failed)} failed, the last: {failure_reason(failed[-1])}"
                if failed
                else "Choose another --metric."
            )
        )
    model = register(plan, jobs[best]) if plan.register else None
    journal.write(
        {
            "event": "swept", "best": best + 1, "score": scores[best], "job": jobs[best].id, "model": model,
            "scores": scores,
        }
    )  # fmt: skip


def own_cluster(sweep: SweepFolder) -> Cluster:
    """The cluster that this process is a job of; ClusterError if it is none."""
    local, sent = running(), sweep.submissions()
    # Trials then run with this very Python, as the sweep does.
    if local is not None and sent and sent[-1]["dashboard_url"] == local.dashboard_url:
        return local
    cluster = connect()
    if cluster is None:
        raise ClusterError("A sweep's driver runs on a cluster: `tandem train sweep` submits it.")
    return cluster


def best_of(metric: str, scores: list[float | None]) -> int | None:
    """Where the best score is; of equal ones the first. None if there is none."""
    best: int | None = None
    for at, value in enumerate(scores):
        if value is not None and (best is None or better(metric, value, scores[best] or 0.0)):
            best = at
    return best


def failure_reason(job: JobFolder) -> str:
    """What a failed job said, or where to look if it could not say anything."""
    end = job.last("failed", "started")
    return str(end["error"]) if end and "error" in end else f"`tandem train logs {job.id}` tells why."


def register(plan: SweepPlan, job: JobFolder) -> str | None:
    """Have a finished trial's job register its result under the sweep's name, as it would have done by itself."""
    # It brings PyTorch, which nothing before needs.
    from tandem.train.launch import run_job

    prepare(replace(job.config(), register=True), compared=plan.compared)
    run_job(job.path, Journal(job.path / "events.jsonl"))
    end = job.finished()
    return str(end["model"]) if end and end.get("model") else None


def run_trial(wanted: Mapping[str, Any]) -> None:
    """One trial, in an actor of Tune's: submit the job, or join it, and report until it is over. JobError if it fails."""
    job = JobFolder(Path(wanted["jobs"][wanted["trial"]]))
    told: dict[str, dict[str, Any]] = {}
    if not job.finished():
        client = JobClient(Cluster(**wanted["cluster"]))
        submission = client.submit(job)
        reported = -REPORT_EVERY_S
        for line in client.follow_resubmitted(job, submission):
            event = events.decode(line)
            if event is None:
                continue
            told[event["event"]] = event
            if event["event"] == "step" and time.monotonic() - reported >= REPORT_EVERY_S:
                reported = time.monotonic()
                tune.report(reportable(told))
        if not job.finished():
            raise JobError(str(told.get("failed", {}).get("error") or client.message(submission)))
    tune.report(reportable({event["event"]: event for event in job.events()}))


def reportable(told: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of a job's newest `step`, and of its newest `evaluation` if there is one."""
    step, evaluation = told.get("step", {}), told.get("evaluation", {})
    numbers = {**step, "evaluation_loss": evaluation.get("loss"), "perplexity": evaluation.get("perplexity")}
    # Tune has a `time` of its own.
    return {k: v for k, v in numbers.items() if isinstance(v, int | float) and k != "time"}


class JournalCallback(tune.Callback):
    """Writes Tune's news into the sweep's journal, in the driver."""

    def __init__(self, journal: Path, jobs: list[JobFolder], plan: SweepPlan) -> None:
        # Tune pickles its callbacks, which an open journal does not bear.
        self._journal, self._jobs, self._metric = journal, jobs, plan.metric

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has its turn."""
        self._tell(trial, JobState.PENDING, {})

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial has reported."""
        self._tell(trial, JobState.RUNNING, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial is done."""
        self._tell(trial, JobState.FINISHED, trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has failed; the others go on."""
        reason = failure_reason(self._jobs[int(trial.config["trial"])])
        self._tell(trial, JobState.FAILED, trial.last_result or {}, error=reason)

    def _tell(self, trial: Any, state: JobState, result: Mapping[str, Any], **more: str) -> None:
        number = int(trial.config["trial"])
        kept = ("step", "steps", "loss", "tokens_per_s", "evaluation_loss", self._metric)
        numbers = {key: result[key] for key in kept if isinstance(result.get(key), int | float)}
        Journal(self._journal).write(
            {
                "event": "trial",
                "trial": number + 1,
                "job": self._jobs[number].id,
                "state": str(state),
                **numbers,
                **more,
            }
        )


if __name__ == "__main__":
    # Under its own name, so that what Tune's actors unpickle is found in a module they can import.
    from tandem.jobs.tune import main as named_main

    sys.exit(named_main(sys.argv[1:]))
