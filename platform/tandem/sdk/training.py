"""Submission of training jobs: send a job to a cluster and follow it to its end."""

from __future__ import annotations

from rich.markup import escape

from tandem.cluster.local import Cluster
from tandem.config import TrainConfig, worker_counts
from tandem.jobs.client import JobClient
from tandem.jobs.folder import JobFolder, JobState
from tandem.jobs.prepare import prepare
from tandem.observability.events import Failed
from tandem.sdk.cluster import check_gpus, open_cluster, uninterrupted
from tandem.sdk.console import INTERRUPTED, console
from tandem.sdk.progress import JobView
from tandem.sdk.summary import print_result


def submit(config: TrainConfig, *, detach: bool = False, raw: bool = False) -> int:
    """Submit a job to the cluster at RAY_ADDRESS, or to a local one, and follow it; returns its exit status."""
    job = prepare(config)
    console.print(f"Job [bold]{job.id}[/]")
    if job.finished():
        print_result(job)
        return 0
    workers = worker_counts(config)[0]
    check_gpus(workers * config.parallel.gpus_per_worker, "The job", "parallel.gpus_per_worker or parallel.workers")
    with open_cluster(num_cpus=logical_cpus(config), keep=detach) as cluster:
        if detach:
            client = JobClient(cluster)
            client.submit(job)
            console.print(
                f"Submitted. `tandem train status {job.id}` tells how it is, `tandem train logs -f {job.id}` shows it."
            )
            return 0
        return follow(cluster, job, raw=raw)


def follow(cluster: Cluster, job: JobFolder, *, title: str | None = None, raw: bool = False) -> int:
    """Submit a prepared job and show it until it is over; returns its exit status.

    Ctrl-C stops a job on a cluster of our own, and lets go of one on any other.
    """
    client = JobClient(cluster)
    submission = client.submit(job)
    with JobView(console, title or job.config().name, raw=raw) as view:
        try:
            view.follow(client.follow_resubmitted(job, submission))
        except BaseException as left:
            if not isinstance(left, KeyboardInterrupt | SystemExit):
                raise
            if not cluster.owned:
                console.print(
                    f"\nThe job continues. `tandem train logs -f {job.id}` shows it, `tandem train stop {job.id}` ends it."
                )
                return INTERRUPTED
            with uninterrupted():
                client.stop(_newest(job, submission), timeout_s=10)
                job.mark_stopped()
            console.print("\nStopped. The same command resumes from the newest checkpoint.")
            raise
    submission = _newest(job, submission)
    status = client.exit_status(submission)
    if status == 0 and job.finished():
        print_result(job, cluster)
    elif status != 0:
        _say_failed(client, submission, job, view)
    return status or (0 if job.finished() else 1)


def _newest(job: JobFolder, submission: str) -> str:
    # A lost driver has been submitted again meanwhile.
    sent = job.submissions()
    return str(sent[-1]["id"]) if sent else submission


def _say_failed(client: JobClient, submission: str, job: JobFolder, view: JobView) -> None:
    if client.state(submission) is JobState.STOPPED:
        console.print(f"[yellow]{job.id} was stopped.[/] The same command resumes from its newest checkpoint.")
        return
    end = view.ended or job.last(Failed)
    reason = end.error if isinstance(end, Failed) else "\n".join(view.other_lines[-15:]) or client.message(submission)
    console.print(f"[bold red]{job.id} failed:[/] {escape(reason)}", soft_wrap=True)
    console.print(
        f"`tandem train logs {job.id}` shows all of its log; the same command tries again from the newest checkpoint."
    )


def logical_cpus(config: TrainConfig) -> int:
    """CPUs that a local cluster states for a job: its workers, its driver, and the tasks that read its data."""
    import os

    return max(os.cpu_count() or 1, int(config.parallel.workers * config.parallel.cpus_per_worker) + 6)
