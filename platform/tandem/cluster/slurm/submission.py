"""Submission of a Slurm job: the files in its folder that the batch script needs."""

from __future__ import annotations

import sys

from tandem.cluster.slurm.folder import JobFolder, Submission
from tandem.cluster.slurm.script import RUNTIME_PREFIX, JobRequest, exports, render
from tandem.config.slurm import SlurmSite
from tandem.ids import digest
from tandem.settings import settings, variable


def make_request(submission: Submission, folder: JobFolder, site: SlurmSite) -> JobRequest:
    """The request for a job of this TANDEM_HOME and database."""
    found = settings()
    variables = {
        "TANDEM_HOME": str(found.root),
        # One for each job: nodes may be shared.
        "TANDEM_RUNTIME_DIR": f"/tmp/{RUNTIME_PREFIX}{runtime_name(folder)}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder.token),
        # Workers notice within this many seconds that the head has gone. The default, 60, would keep the allocation for a minute.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
        "OMP_NUM_THREADS": variable("OMP_NUM_THREADS") or "1",
    }
    if found.database_url:
        variables["TANDEM_DATABASE_URL"] = found.database_url
    return JobRequest(
        submission=submission,
        folder=folder,
        tandem=tandem_words(site),
        variables=variables,
        home=found.root,
    )


def tandem_words(site: SlurmSite) -> tuple[str, ...]:
    """The `tandem` command on the nodes: of this environment, or of the image where it has a Python of its own."""
    python = site.container.python if site.container is not None else None
    return (python or sys.executable, "-m", "tandem")


def write_files(request: JobRequest, site: SlurmSite) -> None:
    """Write the batch script, and the variables that it reads, into the job's folder."""
    request.folder.write_environment(exports(site, request.variables))
    request.folder.script.write_text(render(site, request))


def runtime_name(folder: JobFolder) -> str:
    """A short name of the job, the same on all its nodes."""
    return digest(folder.name)[:8]
