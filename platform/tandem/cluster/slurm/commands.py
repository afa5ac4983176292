"""Slurm's own commands on this machine: submit, look, signal, cancel, extend."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tandem.cluster.process import run_program, shown
from tandem.errors import ClusterError

TIMEOUT_S = 60.0
"""Seconds that one of Slurm's commands may take; a busy controller answers late."""
RUNNING_STATES = frozenset({"RUNNING", "COMPLETING", "SUSPENDED"})
WAITING_STATES = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "RESIZING"})


@dataclass(frozen=True, kw_only=True, slots=True)
class JobState:
    """What Slurm says of a job."""

    job_id: str
    state: str
    """Slurm's own word, such as PENDING, RUNNING or TIMEOUT."""
    reason: str = ""
    """Why it waits or has failed, in Slurm's word."""
    nodes: str = ""
    ends_at: datetime | None = None

    @property
    def waits(self) -> bool:
        """Whether it has not started."""
        return self.state in WAITING_STATES

    @property
    def runs(self) -> bool:
        """Whether it runs."""
        return self.state in RUNNING_STATES

    @property
    def is_over(self) -> bool:
        """Whether it has ended, in one way or another."""
        return not self.waits and not self.runs


def available() -> bool:
    """Whether this machine, or this container, has Slurm's commands."""
    return shutil.which("scontrol") is not None


def require() -> None:
    """ClusterError where this machine has no Slurm."""
    if not available():
        raise ClusterError(
            "This machine has no `sbatch`. Run this on a login node of the cluster; only `tandem slurm tunnel` works elsewhere."
        )


def submit(script: Path, arguments: Sequence[str] = ()) -> str:
    """Submit a batch script; returns Slurm's id of the job. ClusterError with Slurm's own words where it refuses."""
    require()
    answer = _run(["sbatch", "--parsable", *arguments, str(script)])
    # ID, or ID;CLUSTER where there are several.
    return answer.strip().splitlines()[-1].partition(";")[0]


def state(job_id: str) -> JobState | None:
    """What Slurm says of a job; None: it has forgotten it, some minutes after the job's end."""
    known = states(job_id)
    return known[0] if known else None


def states(job_id: str) -> list[JobState]:
    """The same of a job array: what Slurm says of each of its tasks, of those that wait in one."""
    answer = _run(["scontrol", "--oneliner", "show", "job", job_id], missing_ok=True)
    return [parse_job(line) for line in answer.splitlines() if line.strip()]


def parse_job(answer: str) -> JobState:
    """What `scontrol --oneliner show job` prints."""
    # Values with spaces, such as commands, hold no `Name=` of the fields that are read here.
    fields = dict(re.findall(r"(?:^|\s)([A-Za-z/:]+)=(\S*)", answer.strip()))
    return JobState(
        job_id=fields.get("JobId", ""),
        state=fields.get("JobState", ""),
        reason="" if fields.get("Reason") in (None, "None") else fields["Reason"],
        nodes="" if fields.get("NodeList") in (None, "(null)") else fields["NodeList"],
        ends_at=_time(fields.get("EndTime", "")),
    )


def run_step(arguments: Sequence[str], words: Sequence[str], *, timeout_s: float) -> str:
    """Output of a command on a compute node, in an allocation of its own. ClusterError with what it said if it fails."""
    require()
    command = ["srun", "--quiet", *arguments, *words]
    hint = "No compute node may have been free; `squeue --me` shows what the job waits for."
    done = run_program(command, timeout_s=timeout_s, hint=hint)
    if done.returncode:
        raise ClusterError(f"{shown(words)} failed on a compute node: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def cancel(job_id: str) -> None:
    """End a job: its processes get SIGTERM, and SIGKILL 30 s later."""
    _run(["scancel", job_id])


def extend(job_id: str, minutes: int) -> None:
    """Give a running job more time. Most sites let only operators do so; ClusterError with Slurm's words where it is refused."""
    _run(["scontrol", "update", f"JobId={job_id}", f"TimeLimit=+{minutes}"])


def _time(text: str) -> datetime | None:
    """Slurm prints local times without a zone."""
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S").astimezone(UTC)
    except ValueError:
        return None


def _run(command: list[str], *, missing_ok: bool = False) -> str:
    hint = "Is this a login node, and does Slurm's controller answer? `sinfo` shows both."
    done = run_program(command, timeout_s=TIMEOUT_S, hint=hint)
    if done.returncode == 0:
        return done.stdout
    said = (done.stderr or done.stdout).strip()
    if missing_ok and "Invalid job id" in said:
        return ""
    raise ClusterError(f"`{' '.join(command[:2])}` was refused. Slurm says: {said or 'nothing'}")
