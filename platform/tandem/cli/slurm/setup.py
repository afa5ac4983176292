"""`tandem slurm setup`: prepare a cluster's shared file system, and check it on a compute node."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

import tandem
from tandem.cli.slurm.site import SetOption, SiteOption
from tandem.cli.support.shell import friendly_errors
from tandem.cluster.slurm import setup
from tandem.cluster.slurm.site import site_values
from tandem.cluster.ssh import SshConnection, connected
from tandem.config.load import from_dict
from tandem.config.slurm import SlurmSite
from tandem.errors import ConfigError
from tandem.sdk.console import console

CHECK_S = 900.0
"""Seconds for the check; a compute node has to become free for it."""


def setup_command(
    folder: Annotated[str, typer.Argument(help="Folder for Tandem on the cluster's shared file system.")],
    host: Annotated[
        str | None,
        typer.Option(metavar="USER@HOST", help="The login node; unset: login.host of the site, or this machine."),
    ] = None,
    home: Annotated[str | None, typer.Option(help="TANDEM_HOME there; unset: FOLDER/home.")] = None,
    lock: Annotated[
        str | None, typer.Option(help="The lock file to install, cpu or gpu; unset: gpu with --gpus-per-node.")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs to ask for in the check.")] = 0,
    image_from: Annotated[
        str | None, typer.Option(metavar="URI", help="Where to pull container.image from if it is not there.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Check a compute node at the end.")] = True,
    site: SiteOption = None,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Prepare a cluster for Tandem, here on its login node or from elsewhere by ssh; what is done already stays.

    It copies this checkout, installs its locked environment (or pulls the site's container image), makes TANDEM_HOME, and runs
    `tandem slurm check` on a compute node.
    """
    with friendly_errors():
        if lock not in (None, "cpu", "gpu"):
            raise ConfigError(f"--lock is {lock!r}; it must be cpu or gpu.")
        values = site_values(site, overrides)
        if host is not None:
            values["login"] = {**(values.get("login") or {}), "host": host}
        found = from_dict(SlurmSite, values)
        request = setup.SetupRequest(
            folder=folder.rstrip("/"),
            home=home or f"{folder.rstrip('/')}/home",
            lock=lock or ("gpu" if gpus_per_node else "cpu"),
            image_source=image_from,
        )
        with connected(found.login) as ssh:
            _prepare(found, values, request, ssh)
            command = _command(found, request)
            _show_lines(found, values, request, command)
            if check:
                raise SystemExit(_check(command, gpus_per_node, ssh))


def _prepare(site: SlurmSite, values: dict[str, Any], request: setup.SetupRequest, ssh: SshConnection | None) -> None:
    """Run all steps, and say each."""
    if site.container is None:
        root = Path(tandem.__file__).parents[2]
        if not (root / "Makefile").is_file():
            raise ConfigError("This Tandem is not in a checkout, which has the lock files. Run a checkout's `tandem`.")
        if Path(request.folder) == root and ssh is None:
            outcome = "is this checkout"
        else:
            commit = setup.git(root, "rev-parse", "HEAD").strip()
            with console.status(f"Copying {root}"):
                outcome = setup.copy_project(root, commit, request, ssh)
            if outcome == "copied" and setup.git(root, "status", "--porcelain").strip():
                outcome += " as committed, without the changes since"
        _say(f"project, {request.folder}", outcome)
    for step in [*setup.steps(site, request), setup.site_step(values, request)]:
        with console.status(f"{step.name}; packages and images take minutes"):
            changed = setup.run_step(step, site, ssh)
        _say(step.name, "made" if changed else "is there")


def _say(name: str, outcome: str) -> None:
    console.print(f"  [dim]·[/] {escape(name)}: {outcome}", soft_wrap=True)


def _command(site: SlurmSite, request: setup.SetupRequest) -> str:
    """The `tandem` command of the login node, as a shell reads it."""
    if site.container is None:
        return request.command
    variables = f"TANDEM_HOME={shlex.quote(request.home)}"
    if site.login is not None:
        return f"{variables} {site.login.tandem}"
    return f"{variables} {shlex.join([sys.executable, '-m', 'tandem'])}"


def _show_lines(site: SlurmSite, values: dict[str, Any], request: setup.SetupRequest, command: str) -> None:
    """Print the YAML to use from now on, and the command."""
    console.print(f"\n{request.home}/slurm.yaml on the cluster:", soft_wrap=True)
    typer.echo(_indented(setup.site_lines(values)))
    if site.login is not None:
        console.print("slurm.yaml in TANDEM_HOME of each machine that is to reach it:")
        typer.echo(_indented(setup.login_lines(values, command)))
    console.print(f"Submit jobs on the login node with `{escape(command)} slurm submit ...`.", soft_wrap=True)


def _indented(lines: str) -> str:
    return "\n".join(f"  {line}" for line in lines.splitlines())


def _check(command: str, gpus_per_node: int, ssh: SshConnection | None) -> int:
    with console.status("Checking a compute node"):
        status, output = setup.bash(
            f"COLUMNS={console.width} {command} slurm check --gpus-per-node {gpus_per_node}", ssh, timeout_s=CHECK_S
        )
    console.print("\nOn a compute node:")
    typer.echo(output.rstrip())
    return status
