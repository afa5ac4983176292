"""Printed tables of jobs of `tandem slurm`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.markup import escape

from tandem.cluster.slurm import commands
from tandem.cluster.slurm.folder import Connection, JobFolder
from tandem.sdk.console import console


def show_connection(connection: Connection, folder: JobFolder) -> None:
    """Print how to reach a job's app; its key only by the file that holds it."""
    job_id = connection.job_id
    console.print(
        f"Job {job_id} is {connection.state}." + (f" {escape(connection.message)}" if connection.message else "")
    )
    if not connection.node or not folder.submission().serves:
        return
    console.print(f"  URL on the cluster   http://{connection.node}:{connection.port}/v1", soft_wrap=True)
    console.print(f"  Models               {escape(', '.join(connection.models))}", soft_wrap=True)
    console.print(f"  Ends                 {connection.ends_at or 'not known'}")
    console.print(
        f"  API key              `tandem slurm info {job_id} --json` prints it; {escape(str(folder.path))}/connection.json",
        soft_wrap=True,
    )
    console.print(f"  From your machine    tandem slurm tunnel {job_id}", soft_wrap=True)


def summary(folder: JobFolder) -> dict[str, Any]:
    """A job as `tandem slurm status` lists it; of an array, how many tasks are in each state."""
    submission, connection = folder.submission(), folder.connection()
    known = commands.states(submission.job_id) if submission.job_id and commands.available() else []
    states = [folder.task(number).connection().state for number in submission.tasks] or [connection.state]
    return {
        "job_id": submission.job_id,
        "kind": submission.kind,
        "nodes": submission.nodes,
        "submitted_at": submission.submitted_at,
        "slurm": _counted([each.state for each in known]),
        "state": _counted(states),
        "node": connection.node,
        "ends_at": connection.ends_at,
        "folder": str(folder.path),
    }


def _counted(words: list[str]) -> str | None:
    """`RUNNING`, or `2 RUNNING, 1 PENDING` for several; None for none."""
    if len(words) < 2:
        return words[0] if words else None
    return ", ".join(f"{count} {word}" for word, count in Counter(words).items())
