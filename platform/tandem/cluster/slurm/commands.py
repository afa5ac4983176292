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
    exit_status: int | None = None
    """Of the batch script; None: not known."""

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
        exit_status=_status(fields.get("ExitCode", "")),
    )


def find_job(name: str) -> str | None:
    """Slurm's id of the newest job of this user with a name; None: neither the controller nor accounting knows one."""
    listed = _run(["squeue", "--noheader", "--me", "--states=all", f"--name={name}", "--format=%i"]).split()
    if not listed and shutil.which("sacct") is not None:
        # Many sites keep no accounting: the controller's memory of some minutes is then all there is.
        listed = _accounting([f"--name={name}", "--format=JobIDRaw"]).split()
    return max(listed, key=int) if listed else None


def past_state(job_id: str) -> JobState | None:
    """What accounting says of a job that the controller has forgotten; None where that is nothing."""
    if shutil.which("sacct") is None:
        return None
    lines = _accounting([f"--jobs={job_id}", "--format=JobIDRaw,State,ExitCode"]).splitlines()
    if not lines:
        return None
    # `CANCELLED by 1000`.
    found, state, code = [*lines[-1].split("|"), "", ""][:3]
    return JobState(job_id=found, state=state.partition(" ")[0], exit_status=_status(code))


def _accounting(options: Sequence[str]) -> str:
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--starttime=now-60days", *options]
    try:
        return _run(command)
    except ClusterError as error:
        if "accounting" in str(error).lower():
            return ""
        raise


def warn(job_id: str) -> None:
    """Send a running job the signal that precedes its time limit: it saves and ends."""
    _run(["scancel", "--batch", "--signal=USR1", job_id])


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


def _status(text: str) -> int | None:
    """Slurm prints STATUS:SIGNAL."""
    status = text.partition(":")[0]
    return int(status) if status.isdecimal() else None


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
