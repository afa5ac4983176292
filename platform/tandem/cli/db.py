"""`tandem db`: the database that holds the registry."""

from __future__ import annotations

import typer

from tandem.cli.support.shell import friendly_errors
from tandem.registry import upgrade
from tandem.sdk.console import console
from tandem.settings import settings

db_app = typer.Typer(
    no_args_is_help=True, help="The database of the registry: TANDEM_DATABASE_URL, or SQLite in TANDEM_HOME."
)


@db_app.command("upgrade")
def upgrade_command() -> None:
    """Make the registry's tables, or bring them up to date. A PostgreSQL database needs it before its first use."""
    with friendly_errors():
        done = upgrade(settings().registry_url)
        console.print(
            f"The registry at {done.redacted_url} is at schema {done.revision}. Its identity is {done.identity}."
        )
