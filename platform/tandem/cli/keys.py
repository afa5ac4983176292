"""`tandem keys`: create, list, rotate and revoke API keys."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tandem.auth import ApiKey, Limits, NewKey, Role
from tandem.auth.key_table import POLL_S
from tandem.auth.tenants import DEFAULT_TENANT
from tandem.cli.support.shell import friendly_errors
from tandem.errors import ConfigError
from tandem.sdk.console import console
from tandem.sdk.keys import Keys, duration

keys_app = typer.Typer(
    no_args_is_help=True,
    help="API keys of the served app. From the first key on, every request needs one; a change holds within 5 seconds.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Key = Annotated[str, typer.Argument(help="The id of a key, or its name if one active key has it.")]


@keys_app.command("create")
def create_command(
    name: Annotated[str, typer.Argument(help="Who or what uses it.")],
    tenant: Annotated[str, typer.Option(help="Whose models, limits and usage it shares.")] = DEFAULT_TENANT,
    role: Annotated[Role, typer.Option(help="What it may do.")] = Role.USER,
    models: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="A model or adapter that it may use; repeatable. Without: all."),
    ] = None,
    expires_in: Annotated[str | None, typer.Option(help="Such as 12h or 30d. Without: never.")] = None,
    limit: Annotated[
        list[str] | None, typer.Option(help=f"LIMIT=NUMBER, repeatable: {', '.join(Limits.__dataclass_fields__)}.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a key, and print it: nobody can be shown it again."""
    with friendly_errors():
        new = Keys.open().create(
            name,
            tenant=tenant,
            role=role,
            models=models or (),
            limits=parse_limits(limit or []),
            expires_in=expires_in,
        )
        _print_new(new, as_json)


@keys_app.command("ls")
def list_command(
    tenant: Annotated[str | None, typer.Option(help="Only keys of this tenant.")] = None,
    every: Annotated[bool, typer.Option("--all", "-a", help="Expired and revoked keys too.")] = False,
    as_json: Json = False,
) -> None:
    """List keys, without their secrets."""
    with friendly_errors():
        keys = Keys.open().list(tenant=tenant, every=every)
        if as_json:
            console.print_json(json.dumps([key.to_json() for key in keys]))
        elif keys:
            console.print(_table(keys, datetime.now(UTC)))
        else:
            console.print("There is no active key. `tandem keys create NAME` makes one.")


@keys_app.command("rotate")
def rotate_command(
    key: Key,
    overlap: Annotated[str, typer.Option(help="How long the old key is accepted, such as 0s, 1h or 2d.")] = "24h",
    as_json: Json = False,
) -> None:
    """Replace a key by a new one with the same rights, and print that."""
    with friendly_errors():
        keys = Keys.open()
        old = keys.get(key)
        new = keys.rotate(old.id, overlap=duration(overlap))
        _print_new(new, as_json)
        if not as_json:
            console.print(f"[dim]{old.id} is accepted for {overlap} more.[/]")


@keys_app.command("revoke")
def revoke_command(key: Key, as_json: Json = False) -> None:
    """End a key: every gateway refuses it within 5 seconds."""
    with friendly_errors():
        revoked = Keys.open().revoke(key)
        if as_json:
            console.print_json(json.dumps(revoked.to_json()))
        else:
            console.print(f"{revoked.id} ({escape(revoked.name)}) is revoked.")


def parse_limits(pairs: list[str]) -> Limits:
    """Limits from LIMIT=NUMBER; ConfigError for anything else."""
    values: dict[str, int] = {}
    for pair in pairs:
        key, _, number = pair.partition("=")
        if not re.fullmatch(r"-?\d{1,15}", number):
            raise ConfigError(f"--limit {pair!r} is not LIMIT=NUMBER, such as requests_per_minute=60.")
        values[key] = int(number)
    return Limits.from_json(values)


def _print_new(new: NewKey, as_json: bool) -> None:
    if as_json:
        console.print_json(json.dumps(new.key.to_json() | {"secret": new.secret}))
        return
    console.print(f"[bold]{new.secret}[/]")
    key = new.key
    console.print(
        f"[dim]{key.id}: {escape(key.name)}, tenant {key.tenant}, role {key.role}. Keep it: it cannot be shown again. Gateways "
        f"that are up accept it within {2 * POLL_S:g} s.[/]"
    )


def _table(keys: list[ApiKey], now: datetime) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("KEY", "NAME", "TENANT", "ROLE", "STATE", "MODELS", "LIMITS"):
        table.add_column(column, no_wrap=column == "KEY", overflow="fold")
    for key in keys:
        limits = "\n".join(f"{name}={value}" for name, value in key.limits.to_json().items())
        state = key.state(now)
        if state == "active" and key.expires_at is not None:
            state = f"until {key.expires_at:%Y-%m-%d %H:%M}"
        row = (key.name, key.tenant, str(key.role), state, ", ".join(key.models) or "all", limits or "-")
        table.add_row(f"[bold]{key.id}[/]", *map(escape, row))
    return table
