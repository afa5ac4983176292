"""`tandem adapters`: register, promote, roll back, pin and delete adapters, and see where they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tandem.cli.models import ago, as_values
from tandem.cli.support.shell import friendly_errors
from tandem.registry import ModelRecord
from tandem.sdk.adapters import AuditedAdapters
from tandem.sdk.console import console

adapters_app = typer.Typer(
    no_args_is_help=True, help="Register, promote, pin and delete adapters; what is served follows at once."
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
NameOrId = Annotated[str, typer.Argument(help="A name, or an id such as my-adapter@2.")]


@adapters_app.command("register")
def register_command(
    name: Annotated[str, typer.Argument(help="What it is called.")],
    source: Annotated[
        str, typer.Argument(help="A folder in peft's format, a URI (s3://...), or the id of a training job.")
    ],
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="The registered model that it adapts; a job knows its own.")
    ] = None,
    promote: Annotated[
        bool, typer.Option("--promote/--no-promote", help="Whether NAME means this version at once.")
    ] = True,
    tenant: Annotated[
        str | None, typer.Option(help="Whom a new name belongs to. Without: the tenant of the base, or all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Register an adapter as the next version of a name."""
    with friendly_errors():
        record = _adapters().register(name, source, base=base, promote=promote, tenant=tenant)
        if _printed(record, as_json):
            return
        console.print(f"[bold]{escape(record.id)}[/] adapts {escape(record.base or '')}, rank {record.rank}.")
        if not promote:
            console.print(f"it answers as {escape(record.id)}; [cyan]tandem adapters promote {escape(record.id)}[/]")


@adapters_app.command("list")
def list_command(
    all_versions: Annotated[
        bool, typer.Option("--all", "-a", help="All versions, not the promoted of each name.")
    ] = False,
    after: Annotated[str | None, typer.Option(help="Start after this name (with --all: this id).")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Show at most so many.")] = 100,
    as_json: Json = False,
) -> None:
    """List adapters; marks what is promoted and what is pinned."""
    with friendly_errors():
        adapters = _adapters()
        found = adapters.list(all_versions, after=after, limit=limit + 1)
        shown = found[:limit]
        marks = adapters.marks(shown)
        if as_json:
            console.print_json(json.dumps([as_values(record) | marks[record.id] for record in shown]))
            return
        if not shown:
            console.print("No adapter is registered. `tandem adapters register NAME SOURCE --base MODEL` adds one.")
            return
        console.print(_table(shown, marks, datetime.now(UTC)))
        if len(found) > limit:
            last = shown[-1].id if all_versions else shown[-1].name
            console.print(f"[dim]There are more: --after {escape(last)}[/]")


@adapters_app.command("promote")
def promote_command(
    version: Annotated[str, typer.Argument(help="An id such as my-adapter@2.")], as_json: Json = False
) -> None:
    """Make a version what its name means, from the next request on."""
    with friendly_errors():
        record = _adapters().promote(version)
        if not _printed(record, as_json):
            console.print(f"{escape(record.name)} means [bold]{escape(record.id)}[/] now.")


@adapters_app.command("roll-back")
def roll_back_command(name: Annotated[str, typer.Argument(help="A name.")], as_json: Json = False) -> None:
    """Make a name mean what was promoted before."""
    with friendly_errors():
        record = _adapters().roll_back(name)
        if not _printed(record, as_json):
            console.print(f"{escape(record.name)} means [bold]{escape(record.id)}[/] again.")


@adapters_app.command("history")
def history_command(name: Annotated[str, typer.Argument(help="A name.")], as_json: Json = False) -> None:
    """Show what a name has meant, newest first."""
    with friendly_errors():
        adapters = _adapters()
        promotions = adapters.promotions(adapters.registry.resolve(name).name)
        if as_json:
            rows = [{"id": p.id, "at": p.at.isoformat(), "taken_back": p.taken_back} for p in promotions]
            console.print_json(json.dumps(rows))
            return
        for promotion in promotions:
            gone = "  [dim](taken back)[/]" if promotion.taken_back else ""
            console.print(f"{promotion.at:%Y-%m-%d %H:%M:%S} UTC  {escape(promotion.id)}{gone}")


@adapters_app.command("pin")
def pin_command(name: NameOrId, as_json: Json = False) -> None:
    """Keep an adapter loaded on every replica of its base: one version, or whichever a name means."""
    with friendly_errors():
        record = _adapters().pin(name)
        if not _printed(record, as_json):
            console.print(f"Replicas of {escape(record.base or '')} keep [bold]{escape(name)}[/] loaded.")


@adapters_app.command("unpin")
def unpin_command(name: NameOrId) -> None:
    """Undo pin, of the same name or id."""
    with friendly_errors():
        was = _adapters().unpin(name)
        console.print(f"{escape(name)} is pinned no more." if was else f"{escape(name)} was not pinned.")


@adapters_app.command("delete")
def delete_command(
    name: NameOrId, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False, as_json: Json = False
) -> None:
    """Forget one version, or all of a name. Files stay; a name whose promoted version goes means the one before."""
    with friendly_errors():
        adapters = _adapters()
        versions = ", ".join(record.id for record in adapters.versions(name))
        if not yes:
            typer.confirm(f"Forget {versions}?", abort=True)
        removed = adapters.delete(name)
        if as_json:
            console.print_json(json.dumps([as_values(record) for record in removed]))
        else:
            console.print(f"Forgot {escape(', '.join(record.id for record in removed))}; files stay.")


@adapters_app.command("where")
def where_command(
    name: Annotated[str | None, typer.Argument(help="Only replicas that hold this id.")] = None, as_json: Json = False
) -> None:
    """Show which replica of the served app holds which adapters; asks the gateway, with an admin's key in TANDEM_API_KEY."""
    with friendly_errors():
        adapters = _adapters()
        wanted = adapters.registry.resolve(name).id if name else None
        replicas = [entry for entry in adapters.where() if wanted is None or wanted in entry["in_memory"]]
        if as_json:
            console.print_json(json.dumps(replicas))
            return
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for column in ("REPLICA", "BASE", "IN SLOTS", "IN MEMORY", "PINNED, NOT KEPT"):
            table.add_column(column, overflow="fold")
        for entry in replicas:
            slots = set(entry["in_slots"])
            memory = [each for each in entry["in_memory"] if each not in slots]
            kept = "; ".join(f"{each}: {why}" for each, why in entry["not_kept"].items())
            row = (entry["replica"], entry["base"], ", ".join(entry["in_slots"]), ", ".join(memory), kept)
            table.add_row(*(escape(cell or "-") for cell in row))
        console.print(table if replicas else "No replica holds it.")


def _adapters() -> AuditedAdapters:
    return AuditedAdapters.open()


def _printed(record: ModelRecord, as_json: bool) -> bool:
    if as_json:
        console.print_json(json.dumps(as_values(record)))
    return as_json


def _table(records: list[ModelRecord], marks: Mapping[str, Mapping[str, bool]], now: datetime) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("ADAPTER", "BASE", "RANK", "STATUS", "CREATED"):
        table.add_column(column, justify="right" if column == "RANK" else "left", no_wrap=column == "ADAPTER")
    for record in records:
        said = ", ".join(mark for mark, is_so in marks[record.id].items() if is_so)
        row = (f"[bold]{escape(record.id)}[/]", escape(record.base or "-"), str(record.rank), said or "-")
        table.add_row(*row, ago(record.created_at, now))
    return table
