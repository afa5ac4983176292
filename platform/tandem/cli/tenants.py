"""`tandem tenants`: limits that all keys of a tenant share."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tandem.auth import KeyStore, Limits
from tandem.cli.keys import parse_limits
from tandem.cli.support.shell import friendly_errors
from tandem.sdk.console import console
from tandem.sdk.keys import operator

tenants_app = typer.Typer(no_args_is_help=True, help="Limits of tenants. A change holds within 5 seconds.")


@tenants_app.command("limit")
def limit_command(
    tenant: Annotated[str, typer.Argument(help="The tenant.")],
    limit: Annotated[
        list[str] | None,
        typer.Option(help=f"LIMIT=NUMBER, repeatable: {', '.join(Limits.__dataclass_fields__)}. Without: no limits."),
    ] = None,
) -> None:
    """Replace the limits of a tenant: its keys have them together, beside each key's own."""
    with friendly_errors():
        limits = parse_limits(limit or [])
        KeyStore.open().limit_tenant(tenant, limits, by=operator())
        told = ", ".join(f"{name}={value}" for name, value in limits.to_json().items()) or "no limits"
        console.print(f"The tenant {escape(tenant)} has {told}.")


@tenants_app.command("ls")
def list_command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List tenants with their limits and numbers of active keys."""
    with friendly_errors():
        tenants = KeyStore.open().tenant_summaries()
        rows = [{"tenant": tenant.name, "keys": tenant.keys, "limits": tenant.limits.to_json()} for tenant in tenants]
        if as_json:
            console.print_json(json.dumps(rows))
            return
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for column in ("TENANT", "KEYS", "LIMITS"):
            table.add_column(column, overflow="fold")
        for tenant in tenants:
            limits = "\n".join(f"{name}={value}" for name, value in tenant.limits.to_json().items())
            table.add_row(escape(tenant.name), str(tenant.keys), limits or "-")
        console.print(table)
