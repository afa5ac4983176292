"""`tandem node`: start and stop this machine as a node of a Ray cluster."""

from __future__ import annotations

import typer

from tandem.cli.support.shell import friendly_errors
from tandem.cluster import node
from tandem.sdk.console import console

node_app = typer.Typer(no_args_is_help=True, help="Run this machine as a node of a Ray cluster.")


@node_app.command("start", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def start_command(context: typer.Context) -> None:
    """Start the head (--head) or join one (--address HOST:PORT). All options are those of `ray start`.

    Sets what serving needs before Ray starts: HAProxy with private files, token authentication, ports of gateways. With
    --restart a node that ends by itself, such as one that Ray has given up after its network was away, is started again until it
    is stopped.
    """
    with friendly_errors():
        node.start(context.args)
        console.print("This node is up. `tandem node stop` ends it.")


@node_app.command("stop")
def stop_command() -> None:
    """End the node that this user started on this machine, and no other Ray process."""
    with friendly_errors():
        count = node.stop()
        console.print(f"Ended {count} processes." if count else "No node of this user runs on this machine.")
