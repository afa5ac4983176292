"""The `tandem` command: one typer app with a module for each group of subcommands."""

from __future__ import annotations

from typing import Annotated

import typer

import tandem
from tandem.cli.adapters import adapters_app
from tandem.cli.audit import audit_command
from tandem.cli.batch import batch_app
from tandem.cli.chat import chat_command
from tandem.cli.cluster import cluster_app
from tandem.cli.data import data_app
from tandem.cli.db import db_app
from tandem.cli.doctor import doctor_command
from tandem.cli.jobs import jobs_app
from tandem.cli.keys import keys_app
from tandem.cli.kubernetes import kubernetes_app
from tandem.cli.models import models_app
from tandem.cli.node import node_app
from tandem.cli.quickstart import quickstart_command
from tandem.cli.serve import serve_app
from tandem.cli.slurm import slurm_app
from tandem.cli.tenants import tenants_app
from tandem.cli.train import train_app
from tandem.cli.usage import usage_command

app = typer.Typer(
    name="tandem",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_show_locals=False,
    help="Train LLMs and serve them on one Ray cluster.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tandem {tandem.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train LLMs and serve them on one Ray cluster."""


app.command("quickstart")(quickstart_command)
app.command("doctor")(doctor_command)
app.command("chat")(chat_command)
app.command("audit")(audit_command)
app.command("usage")(usage_command)
app.add_typer(data_app, name="data")
app.add_typer(train_app, name="train")
app.add_typer(jobs_app, name="jobs")
app.add_typer(models_app, name="models")
app.add_typer(adapters_app, name="adapters")
app.add_typer(serve_app, name="serve")
app.add_typer(keys_app, name="keys")
app.add_typer(tenants_app, name="tenants")
app.add_typer(batch_app, name="batch")
app.add_typer(node_app, name="node")
app.add_typer(db_app, name="db")
app.add_typer(cluster_app, name="cluster")
app.add_typer(slurm_app, name="slurm")
app.add_typer(kubernetes_app, name="kubernetes")
