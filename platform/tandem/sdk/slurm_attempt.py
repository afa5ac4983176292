"""An attempt of a job that the dispatcher runs as a Slurm job, on the Ray cluster of that job."""

from __future__ import annotations

from tandem.jobs.fine_tuning.folder import training_folder
from tandem.sdk.cluster import open_cluster
from tandem.sdk.training import follow


def run_attempt(job_id: str) -> int:
    """Run a training or fine-tuning job that has a folder, until it is over; returns its exit status."""
    with open_cluster() as cluster:
        return follow(cluster, training_folder(job_id), title=job_id, raw=True)
