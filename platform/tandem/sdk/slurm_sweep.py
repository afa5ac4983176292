"""Trials of a sweep as tasks of a Slurm job array: each on a Ray cluster of its own, and their comparison by the last one.

A trial is the same job, in the same folder, that `tandem train sweep` would run, and the sweep's folder is the same too.
"""

from __future__ import annotations

from tandem.errors import JobError
from tandem.jobs.folder import JobFolder
from tandem.jobs.sweep import SweepFolder, find_sweep
from tandem.jobs.sweep_result import finish_if_over, has_failed
from tandem.observability.events import Failed, SweepStarted
from tandem.observability.journal import Journal
from tandem.sdk.cluster import open_cluster
from tandem.sdk.console import INTERRUPTED
from tandem.sdk.training import follow


def begin(sweep: SweepFolder, *, at_once: int) -> None:
    """Record that the trials which have not finished are started: what failed before may finish now."""
    trials = len(sweep.plan().trials)
    event = SweepStarted(sweep=sweep.id, trials=trials, parallel=at_once or trials)
    Journal(sweep.path / "events.jsonl", prints=False).write(event)


def run_trial(sweep_id: str, number: int) -> int:
    """Run one trial (from 1) on the cluster at RAY_ADDRESS; returns its exit status. The last one ends the sweep.

    JobError if there is no such sweep, or if no trial has a value of the metric.
    """
    sweep = find_sweep(sweep_id)
    if sweep is None:
        raise JobError(f"There is no sweep {sweep_id!r} in this TANDEM_HOME.")
    job, status = sweep.jobs()[number - 1], 0
    if not job.finished():
        with open_cluster() as cluster:
            status = follow(cluster, job, raw=True)
    if status == INTERRUPTED or _is_stopped(job):
        # It goes on in another run of the task.
        return status
    if status and not has_failed(job):
        # A driver that was killed has written nothing.
        Journal(job.path / "events.jsonl").write(Failed(error=f"The trial ended with status {status}."))
    finish_if_over(sweep)
    return status


def _is_stopped(job: JobFolder) -> bool:
    submissions = job.submissions()
    return bool(submissions and submissions[-1].get("stopped"))
