"""`tandem db`: the database that holds the registry, keys, usage and the audit log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tandem.cli.support.shell import friendly_errors
from tandem.db.backup import backup, restore
from tandem.db.database import Upgraded, initialise, upgrade
from tandem.sdk.console import console
from tandem.settings import settings

db_app = typer.Typer(
    no_args_is_help=True, help="The database of the registry: TANDEM_DATABASE_URL, or SQLite in TANDEM_HOME."
)
FileArgument = Annotated[Path, typer.Argument(help="The backup; it holds the hashes of API keys.")]


@db_app.command("init")
def init_command() -> None:
    """Make the registry's tables in an empty database, as PostgreSQL needs before its first use; one with tables is refused."""
    with friendly_errors():
        _print_state(initialise(settings().registry_url))


@db_app.command("upgrade")
def upgrade_command() -> None:
    """Bring the registry's tables up to date, or make them."""
    with friendly_errors():
        _print_state(upgrade(settings().registry_url))


def _print_state(done: Upgraded) -> None:
    console.print(
        f"The registry at {escape(done.redacted_url)} is at schema {done.revision}. Its identity is {done.identity}.",
        soft_wrap=True,
    )


@db_app.command("backup")
def backup_command(file: FileArgument) -> None:
    """Write the whole database, as it is at one moment, to a new file. Apps and jobs go on meanwhile."""
    with friendly_errors():
        done = backup(settings().registry_url, file)
        console.print(f"{done.rows} rows of {escape(done.redacted_url)} are in {escape(str(file))}.", soft_wrap=True)


@db_app.command("restore")
def restore_command(file: FileArgument) -> None:
    """Fill an empty database with a backup, also one of another kind: from SQLite to PostgreSQL, for several nodes."""
    with friendly_errors():
        done = restore(settings().registry_url, file)
        console.print(
            f"{done.rows} rows are in {escape(done.redacted_url)}, the registry {done.identity}.", soft_wrap=True
        )
