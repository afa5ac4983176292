"""Access to the apps of Slurm jobs: by the files of this home, or over SSH by those of the login node's."""

from __future__ import annotations

import contextlib
import json
import shlex
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tandem.cluster.slurm.folder import Connection, find
from tandem.cluster.slurm.site import read_site as read_site
from tandem.cluster.ssh import SshConnection
from tandem.cluster.tunnel import AppEndedError, Target, Tunnel, in_background
from tandem.config.load import from_dict
from tandem.config.slurm import SlurmSite
from tandem.errors import ClusterError, ConfigError
from tandem.settings import settings

FOLLOW_S = 3.0
"""Seconds between two looks of a tunnel at where its job stands."""
PROBE_S = 3.0
"""Seconds within which a node has to accept a connection to count as reachable."""


@dataclass(frozen=True, slots=True)
class JobReader:
    """Reads where jobs stand."""

    ssh: SshConnection | None
    """The connection to the login node; None: the jobs are of this home."""
    command: str = "tandem"
    """The `tandem` command on the login node."""

    def connection(self, job: str) -> Connection:
        """Where a job stands, by Slurm's id or `latest`; ClusterError if there is none."""
        if self.ssh is None:
            return find(settings().root, job).connection()
        command = f"{self.command} slurm info {shlex.quote(job)} --json"
        shown = self.ssh.run(command)
        try:
            # A login shell may greet before it.
            return from_dict(Connection, json.loads(shown.strip().rpartition("\n")[2]))
        except (ValueError, ConfigError) as error:
            raise ClusterError(
                f"`{command}` on {self.ssh.config.host} did not print a job: {shown.strip()[-500:]!r}. Is it the same version of "
                "Tandem?"
            ) from error

    def ready(self, job: str) -> Connection:
        """The same for a job whose app answers; ClusterError for any other."""
        found = self.connection(job)
        if found.state != "ready" or not found.api_key:
            raise ClusterError(
                f"Job {found.job_id} is {found.state}: there is no app to reach."
                + (f" {found.message}" if found.message else "")
            )
        return found

    def tunnel(self, found: Connection, on_message: Callable[[str], None] = lambda message: None) -> Tunnel:
        """A tunnel to a job's app, and after it to those that succeed it."""
        return Tunnel(self.ssh, _target(found), self._follow(found.job_id), on_message)

    def _follow(self, job_id: str) -> Callable[[], Target | None]:
        """What tells a tunnel where its connections go; see `Tunnel`."""
        checked_at = time.monotonic()

        def find_target() -> Target | None:
            nonlocal checked_at
            if time.monotonic() - checked_at < FOLLOW_S:
                return None
            checked_at = time.monotonic()
            connection = self.connection(job_id)
            newest = connection if connection.state == "ready" else None
            while connection.successor:
                connection = self.connection(connection.successor)
                newest = connection if connection.state == "ready" else newest
            if newest is None and connection.state in ("ended", "failed", "lost"):
                raise AppEndedError(f"Job {connection.job_id} is {connection.state}.")
            return None if newest is None else _target(newest)

        return find_target


@contextlib.contextmanager
def job_app(job: str, site: SlurmSite) -> Iterator[tuple[str, str]]:
    """Base URL and key of a job's app for the length of a block.

    A job of this home whose node this machine reaches is asked there; any other through a tunnel by the site's login node, which
    moves to the job's successors. ClusterError if the job has no app that answers, or if there is no way to it.
    """
    here = _ready_here(job)
    if here is not None and _reaches(here):
        yield f"http://{here.node}:{here.port}/v1", here.api_key
        return
    if site.login is None:
        # Raises what is wrong with the job, if that is why it was not found.
        found = JobReader(None).ready(job)
        raise ClusterError(
            f"This machine does not reach {found.node}:{found.port}, where job {found.job_id} answers. Name the login node in "
            "slurm.yaml: login: {host: USER@HOST}."
        )
    with SshConnection(site.login) as ssh:
        reader = JobReader(ssh, site.login.tandem)
        found = reader.ready(job)
        with in_background(reader.tunnel(found)) as port:
            yield f"http://127.0.0.1:{port}/v1", found.api_key


def _target(connection: Connection) -> Target:
    return Target(f"job {connection.job_id}", connection.node, connection.port)


def _ready_here(job: str) -> Connection | None:
    """The job by the files of this home; None if it is not there, or its app does not answer."""
    try:
        return JobReader(None).ready(job)
    except ClusterError:
        return None


def _reaches(connection: Connection) -> bool:
    try:
        with socket.create_connection((connection.node, connection.port), timeout=PROBE_S):
            return True
    except OSError:
        return False
