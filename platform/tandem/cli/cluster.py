"""`tandem cluster`: clusters of Ray's launcher, from a cluster file; and nodes that are kept out."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tandem.cli.cluster_health import cordon_command, cordons_command, uncordon_command
from tandem.cli.support.shell import friendly_errors
from tandem.cluster.launcher import ClusterFile, Launcher
from tandem.cluster.ssh import SshConnection
from tandem.cluster.tunnel import Target, Tunnel
from tandem.sdk.console import console
from tandem.settings import settings

cluster_app = typer.Typer(no_args_is_help=True, help="Start, reach and end a cluster of machines; keep nodes out.")
cluster_app.command("cordon")(cordon_command)
cluster_app.command("uncordon")(uncordon_command)
cluster_app.command("cordons")(cordons_command)
FileArgument = Annotated[Path, typer.Argument(help="The cluster file; cluster.yaml is for AWS, deploy/ has others.")]


@cluster_app.command("up")
def up_command(file: FileArgument = Path("cluster.yaml")) -> None:
    """Start a cluster, or apply a changed file to it, and wait for the nodes that are there from the start."""
    with friendly_errors():
        launcher = Launcher(ClusterFile.read(file))
        head = launcher.up()
        with console.status("Waiting for the nodes"):
            count = launcher.wait_for_workers()
        console.print(f"{launcher.file.values['cluster_name']} is up: {count} nodes, the head at {head}.")
        console.print("[dim]Next:[/]")
        for command, purpose in (
            (f"ray attach {file}", "a shell on the head, where `tandem` works on the cluster"),
            (f"tandem cluster tunnel {file}", "its app on this machine"),
            (f"tandem cluster down {file}", "end it"),
        ):
            console.print(f"  {escape(command)}   [dim]{purpose}[/]", soft_wrap=True)


@cluster_app.command("status")
def status_command(file: FileArgument = Path("cluster.yaml")) -> None:
    """Show a cluster's nodes and resources, and what is served on it."""
    with friendly_errors():
        launcher = Launcher(ClusterFile.read(file))
        console.print(f"Head: {launcher.head()}")
        typer.echo(launcher.run("ray status"))
        typer.echo(launcher.run("tandem serve status"))


@cluster_app.command("down")
def down_command(file: FileArgument = Path("cluster.yaml")) -> None:
    """End all nodes of a cluster."""
    with friendly_errors():
        launcher = Launcher(ClusterFile.read(file))
        launcher.down()
        console.print(f"{launcher.file.values['cluster_name']} is down.")


@cluster_app.command("tunnel")
def tunnel_command(
    file: FileArgument = Path("cluster.yaml"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of this machine; 0: a free one.")] = 8000,
    remote_port: Annotated[int | None, typer.Option(min=1, max=65535, help="The app's port on the head.")] = None,
) -> None:
    """Open a port of this machine that leads to a cluster's app, until Ctrl-C."""
    with friendly_errors():
        launcher = Launcher(ClusterFile.read(file))
        name = str(launcher.file.values["cluster_name"])
        with SshConnection(launcher.file.login(launcher.head())) as ssh:
            target = Target(name, "127.0.0.1", remote_port or settings().port)
            tunnel = Tunnel(ssh, target, lambda: None, lambda message: console.print(escape(message)))
            asyncio.run(tunnel.run(port, lambda number: _show(number, name)))


def _show(number: int, name: str) -> None:
    console.print(f"http://127.0.0.1:{number}/v1 leads to {escape(name)}. Ctrl-C ends it.")
