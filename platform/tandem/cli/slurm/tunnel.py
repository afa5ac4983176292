"""`tandem slurm tunnel`: a local port that leads to a job's app."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
from rich.markup import escape

from tandem.cli.slurm.site import JobArgument, SetOption, SiteOption
from tandem.cli.support.shell import friendly_errors
from tandem.cluster.ssh import connected
from tandem.sdk.console import console
from tandem.sdk.slurm import JobReader, read_site


def tunnel_command(
    job: JobArgument = "latest",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of this machine; 0: a free one.")] = 8000,
    site: SiteOption = None,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Open a port of this machine that leads to a job's app, until Ctrl-C."""
    with friendly_errors():
        login = read_site(site, overrides).login
        with connected(login) as ssh:
            reader = JobReader(ssh) if login is None else JobReader(ssh, login.tandem)
            found = reader.ready(job)

            def show(number: int) -> None:
                models = escape(", ".join(found.models))
                console.print(f"http://127.0.0.1:{number}/v1 leads to job {found.job_id} ({models}). Ctrl-C ends it.")
                where = f" on {escape(login.host)}" if login is not None else ""
                info = f"`tandem slurm info {found.job_id} --json`{where} prints the key"
                console.print(f"[dim]{info}; `tandem chat --slurm {found.job_id}` needs none.[/]", soft_wrap=True)

            asyncio.run(reader.tunnel(found, lambda message: console.print(escape(message))).run(port, show))
            console.print(f"Job {found.job_id} has ended.")
