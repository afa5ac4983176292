"""The folder of one Slurm job, below TANDEM_HOME: what was submitted, and what the job writes for others to read.

All nodes and the login node see it. Its mode is 0700, since the key of the app and Ray's token are in it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from tandem.config.load import from_dict
from tandem.errors import ClusterError, ConfigError
from tandem.private import check_private_folder, make_private_folder, read_private_file
from tandem.storage import write_atomic

T = TypeVar("T")

STOP_FILE = "stop"
LEAVE_FILE = "leave"
"""Exists where a job that is told to end must not be queued again."""
TIME_LIMIT, USER = "time-limit", "user"
"""Reasons why a run is told to end."""
HEARTBEAT_S = 10.0
"""Seconds between two heartbeats of a job whose app answers."""
LOST_S = 60.0
"""Seconds without a heartbeat after which the job counts as lost: it was killed, or its node has died."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """What a job runs, and on what."""

    kind: str
    """`serve`, `train` or `sweep`."""
    command: tuple[str, ...]
    """Words of the `tandem` command that the first node runs."""
    nodes: int
    gpus_per_node: int
    port: int = 8000
    """The app's port on the first node."""
    time: str = ""
    """The time limit that is asked for, in one of Slurm's forms; empty: not known."""
    submitted_at: str = ""
    """ISO 8601, UTC."""
    job_id: str | None = None
    """Slurm's id; None: not submitted yet."""
    succeeds: str | None = None
    """Name of the folder of the job whose clients come to this one when it answers."""
    tasks: tuple[int, ...] = ()
    """Numbers of the tasks of a job array, each with a folder of its own; empty: a single job."""
    tasks_at_once: int = 0
    """Tasks that run at a time, at most; 0: as many as there is room for."""

    @property
    def serves(self) -> bool:
        """Whether it runs an app; else it trains, and goes on in another run where it was ended."""
        return self.kind == "serve"


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """Where a run's first node is, for the others."""

    run: str
    """Slurm's id of the job, and the number of its restarts: a requeued job finds the file of its run before."""
    address: str
    """HOST:PORT of Ray's control plane; empty: the run has ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Connection:
    """What a client needs to reach a job's app, and where a job stands."""

    job_id: str
    state: str
    """`waiting`, `starting`, `ready`, `ending`, `ended`, `failed` or `lost`."""
    node: str = ""
    """Address of the node with the app's listener."""
    port: int = 0
    models: tuple[str, ...] = ()
    api_key: str = ""
    api_key_id: str = ""
    ends_at: str = ""
    """When Slurm ends the job at the latest (ISO 8601, UTC); empty: not known."""
    message: str = ""
    """Why it has failed."""
    successor: str = ""
    """Id of the job that takes over when this one ends."""
    heartbeat_at: str = ""
    """When the job wrote last that its app answers (ISO 8601, UTC); empty: it has not."""

    def beating(self, now: datetime) -> Connection:
        """The same with this time as its last heartbeat."""
        return replace(self, heartbeat_at=now.isoformat(timespec="seconds"))

    def checked(self, now: datetime) -> Connection:
        """The same; `lost` if it is ready and its last heartbeat is older than `LOST_S`."""
        if self.state != "ready" or not self.heartbeat_at:
            return self
        age_s = (now - datetime.fromisoformat(self.heartbeat_at)).total_seconds()
        if age_s <= LOST_S:
            return self
        message = (
            f"Its last heartbeat was at {self.heartbeat_at}, {age_s:.0f} s ago: it was killed, or its node has died."
        )
        return replace(self, state="lost", message=message)


@dataclass(frozen=True, slots=True)
class JobFolder:
    """One job's folder; files are replaced whole, so that a reader never sees a part."""

    path: Path

    @classmethod
    def create(cls, home: Path, submission: Submission, name: str | None = None) -> JobFolder:
        """A new folder below `home`, with a token for the job's Ray cluster; `name`: None: one that is new."""
        started = datetime.now(UTC)
        folder = cls(home / "slurm" / (name or f"{submission.kind}-{started:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"))
        make_private_folder(folder.path)
        check_private_folder(folder.path)
        write_atomic(folder.token, secrets.token_hex(32), mode=0o600)
        folder.write_submission(replace(submission, submitted_at=started.isoformat(timespec="seconds")))
        return folder

    @property
    def name(self) -> str:
        """Its name."""
        return self.path.name

    def task(self, number: int) -> JobFolder:
        """The folder of a task of a job array."""
        return JobFolder(self.path / "tasks" / str(number))

    def create_task(self, number: int, submission: Submission) -> None:
        """Make the folder of a task."""
        make_private_folder(self.task(number).path)
        self.task(number).write_submission(submission)

    def write_job_id(self, job_id: str) -> None:
        """Record Slurm's id of the job, for its tasks too."""
        submission = self.submission()
        self.write_submission(replace(submission, job_id=job_id))
        for number in submission.tasks:
            task = self.task(number)
            task.write_submission(replace(task.submission(), job_id=f"{job_id}_{number}"))

    @property
    def token(self) -> Path:
        """Ray's token for this job's cluster."""
        return self.path / "token"

    @property
    def script(self) -> Path:
        """The batch script."""
        return self.path / "script.sh"

    @property
    def environment(self) -> Path:
        """Lines of bash that set the variables of the job's nodes; the batch script reads it. Passwords may be in it."""
        return self.path / "environment.sh"

    def write_environment(self, lines: Sequence[str]) -> None:
        """Write it, with mode 0600."""
        write_atomic(self.environment, "\n".join([*lines, ""]), mode=0o600)

    @property
    def log(self) -> Path:
        """The job's output."""
        return self.path / "output.log"

    @property
    def stop_file(self) -> Path:
        """Holds the run that is to end and the reason, if one is; the batch script or `stop` writes it."""
        return self.path / STOP_FILE

    @property
    def runs(self) -> bool:
        """Whether a run has started and not ended."""
        head = self.head()
        return head is not None and bool(head.address)

    def stop(self) -> None:
        """Tell the newest run to end because a user wants it."""
        if (head := self.head()) is not None:
            write_atomic(self.stop_file, f"{head.run} {USER}", mode=0o600)

    def stop_reason(self, run: str) -> str | None:
        """Why a run is to end: `TIME_LIMIT` or `USER`; None: it is not."""
        try:
            named_run, _, reason = self.stop_file.read_text().strip().partition(" ")
        except FileNotFoundError:
            return None
        return reason if named_run == run else None

    def write_submission(self, submission: Submission) -> None:
        """Replace what is submitted."""
        self._write("submission.json", submission)

    def submission(self) -> Submission:
        """What was submitted; ClusterError if this is no job's folder."""
        found = self._read("submission.json", Submission)
        if found is None:
            raise ClusterError(f"{self.path} is no folder of a Slurm job: there is no submission.json in it.")
        return found

    def write_head(self, head: Head) -> None:
        """Say where a run's first node is."""
        self._write("head.json", head)

    def head(self) -> Head | None:
        """Where the newest run's first node is; None: none has started."""
        return self._read("head.json", Head)

    def write_connection(self, connection: Connection) -> None:
        """Say where the job stands."""
        self._write("connection.json", connection)

    def connection(self) -> Connection:
        """Where the job stands; its state is `waiting` until it has started, and `lost` if it has died without a word."""
        connection = self._read("connection.json", Connection)
        if connection is None:
            return Connection(job_id=self.submission().job_id or "", state="waiting")
        connection = connection.checked(datetime.now(UTC))
        # A file of its own: the successor writes it, and the job all else.
        try:
            return replace(connection, successor=(self.path / "successor").read_text().strip())
        except FileNotFoundError:
            return connection

    def write_successor(self, job_id: str) -> None:
        """Name the job that takes over."""
        write_atomic(self.path / "successor", job_id, mode=0o600)

    def _write(self, name: str, value: Any) -> None:
        write_atomic(self.path / name, json.dumps(asdict(value), indent=2), mode=0o600)

    def _read(self, name: str, cls: type[T]) -> T | None:
        try:
            return from_dict(cls, json.loads(read_private_file(self.path / name)))
        except FileNotFoundError:
            return None
        except (ValueError, ConfigError) as error:
            raise ClusterError(f"{self.path / name} cannot be read: {error}") from error


def folders(home: Path) -> list[JobFolder]:
    """All jobs' folders of a home, newest first."""
    found = [JobFolder(path.parent) for path in (home / "slurm").glob("*/submission.json")]
    return sorted(found, key=lambda folder: folder.submission().submitted_at, reverse=True)


def find(home: Path, job: str) -> JobFolder:
    """The folder of a job by Slurm's id or the folder's name; `latest`: the newest. ClusterError if there is none.

    `ID_NUMBER` is a task of a job array.
    """
    found = folders(home)
    if job == "latest" and found:
        return found[0]
    wanted, _, task = job.partition("_")
    for folder in found:
        submission = folder.submission()
        if wanted in (folder.name, submission.job_id) and (not task or task in map(str, submission.tasks)):
            return folder.task(int(task)) if task else folder
    known = ", ".join(filter(None, (folder.submission().job_id for folder in found[:5]))) or "none yet"
    raise ClusterError(f"There is no Slurm job {job!r} in {home}. The newest are: {known}.")
