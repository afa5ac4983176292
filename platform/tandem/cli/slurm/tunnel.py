"""`tandem slurm tunnel`: the way to a job's app."""

from __future__ import annotations

import asyncio
import json
import shlex
import time
from typing import Annotated

import typer
from rich.markup import escape

from tandem.cli.slurm.site import JobArgument, SetOption, SiteOption, read_site
from tandem.cli.support.shell import friendly_errors
from tandem.cluster.slurm.folder import Connection, find
from tandem.cluster.ssh import SshConnection
from tandem.cluster.tunnel import AppEndedError, Target, Tunnel
from tandem.config.load import from_dict
from tandem.errors import ClusterError
from tandem.sdk.console import console
from tandem.settings import settings

FOLLOW_S = 3.0
"""Seconds between two looks of a tunnel at where its job stands."""


def tunnel_command(
    job: JobArgument = "latest",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of this machine; 0: a free one.")] = 8000,
    site: SiteOption = None,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Open a port of this machine that leads to a job's app, until Ctrl-C."""
    with friendly_errors():
        login = read_site(site, overrides).login
        ssh = None if login is None else SshConnection(login)
        try:
            if ssh is not None:
                ssh.open()
            asyncio.run(_tunnel(ssh, job, port, "tandem" if login is None else login.tandem))
        finally:
            if ssh is not None:
                ssh.close()


async def _tunnel(ssh: SshConnection | None, job: str, port: int, command: str) -> None:
    found = await asyncio.to_thread(_connection, ssh, job, command)
    if found.state != "ready":
        raise ClusterError(
            f"Job {found.job_id} is {found.state}: there is no app to reach."
            + (f" {found.message}" if found.message else "")
        )
    target = Target(f"job {found.job_id}", found.node, found.port)
    checked_at = time.monotonic()

    def find_target() -> Target | None:
        nonlocal checked_at
        if time.monotonic() - checked_at < FOLLOW_S:
            return None
        checked_at = time.monotonic()
        newest = None
        connection = _connection(ssh, found.job_id, command)
        while True:
            if connection.state == "ready":
                newest = connection
            if not connection.successor:
                break
            connection = _connection(ssh, connection.successor, command)
        if newest is not None:
            return Target(f"job {newest.job_id}", newest.node, newest.port)
        if connection.state in ("ended", "failed"):
            raise AppEndedError(f"Job {connection.job_id} has {connection.state}.")
        return None

    tunnel = Tunnel(ssh, target, find_target, lambda message: console.print(escape(message)))
    number = await tunnel.start(port)
    console.print(
        f"http://127.0.0.1:{number}/v1 leads to job {found.job_id} ({escape(', '.join(found.models))}). Ctrl-C ends it."
    )
    console.print(
        f"[dim]TANDEM_API_URL=http://127.0.0.1:{number}/v1 TANDEM_API_KEY={found.api_key} tandem chat[/]",
        soft_wrap=True,
    )
    try:
        await tunnel.wait()
        console.print(f"Job {found.job_id} has ended.")
    finally:
        await tunnel.stop()


def _connection(ssh: SshConnection | None, job: str, command: str = "tandem") -> Connection:
    """How to reach a job: from this home, or over SSH from the login node's, by the `command` there."""
    if ssh is None:
        return find(settings().root, job).connection()
    shown = ssh.run(f"{command} slurm info {shlex.quote(job)} --json")
    return from_dict(Connection, json.loads(shown))
