"""`tandem models`: list, inspect, pull, merge and remove models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tandem.auth.tenants import check_tenant
from tandem.cli.support.shell import friendly_errors
from tandem.config import AUTO_ENGINE
from tandem.engine.engines import select_engine
from tandem.errors import ConfigError, RegistryError
from tandem.ids import check_name
from tandem.registry import HubModel, ModelRecord, Registry, local_folder, pull_model
from tandem.registry.hub.reference import MODEL_FORM
from tandem.sdk.console import console as terminal
from tandem.sdk.keys import operator
from tandem.settings import settings

models_app = typer.Typer(no_args_is_help=True, help="List, show, pull, merge and forget models and adapters.")

ADAPTERS_SHOWN = 100

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="A name (its newest version), or an id such as my-model@2.")]


@models_app.command("ls")
def list_command(
    kind: Annotated[Literal["model", "adapter"] | None, typer.Option(help="Only these.")] = None,
    all_versions: Annotated[
        bool, typer.Option("--all", "-a", help="All versions, not the promoted one of each name.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List what is registered: any of it can be asked by its name."""
    with friendly_errors():
        records = Registry.open().list(kind, all_versions)
        if as_json:
            terminal.print_json(json.dumps([as_values(record) for record in records]))
        elif records:
            terminal.print(listing(records, datetime.now(UTC)))
        else:
            terminal.print("Nothing is registered yet. `tandem quickstart` trains a model and an adapter.")


@models_app.command("show")
def show_command(name: Name, as_json: Json = False) -> None:
    """Show one model or adapter: its files, its base and its lineage."""
    with friendly_errors():
        registry = Registry.open()
        record = registry.resolve(name)
        adapters = [other.id for other in registry.list("adapter", base=record.id, limit=ADAPTERS_SHOWN)]
        if as_json:
            derived = {key.replace(" ", "_"): value for key, value in _engine_settings(registry, record).items()}
            terminal.print_json(json.dumps({**as_values(record), "adapters": adapters, **derived}))
        else:
            details(record, adapters, _engine_settings(registry, record), terminal)


@models_app.command("pull")
def pull_command(
    name: Annotated[
        str, typer.Argument(metavar="ORG/NAME[@REVISION]", help="Of the hub; a branch, a tag or a commit.")
    ],
    as_json: Json = False,
) -> None:
    """Download a model of the Hugging Face hub, and register it. What is here already is not downloaded again."""
    with friendly_errors():
        ref = HubModel.parse(name)
        if ref is None:
            raise ConfigError(f"{name!r} names no model of the hub. Its form is {MODEL_FORM}.")
        record = pull_model(ref, Registry.open())
        if as_json:
            terminal.print_json(json.dumps(as_values(record)))
            return
        terminal.print(
            f"[bold]{escape(record.id)}[/] is commit {record.lineage['commit'][:12]} of {escape(ref.repo)}, at "
            f"{escape(record.location)}",
            soft_wrap=True,
        )
        terminal.print(f"serve it: [cyan]tandem serve up {escape(str(ref))}[/]", soft_wrap=True)


@models_app.command("rm")
def remove_command(
    name: Annotated[str, typer.Argument(help="An id such as my-model@2, or a name, meaning all its versions.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Forget a model or adapter. Its files stay; a model that adapters need is refused."""
    with friendly_errors():
        registry = Registry.open()
        record = registry.resolve(name)
        if not yes:
            what = record.id if name == record.id else f"every version of {record.name}"
            typer.confirm(f"Forget {what}?", abort=True)
        removed = registry.remove(name)
        if as_json:
            terminal.print_json(json.dumps([as_values(each) for each in removed]))
            return
        for each in removed:
            terminal.print(
                f"Forgot [bold]{escape(each.id)}[/]; its files stay at {escape(each.location)}", soft_wrap=True
            )


@models_app.command("assign")
def assign_command(
    name: Annotated[str, typer.Argument(help="The name of a model or adapter; all its versions follow.")],
    tenant: Annotated[str | None, typer.Option(help="Whom it shall belong to; for others it does not exist.")] = None,
    shared: Annotated[bool, typer.Option("--shared", help="Let all tenants use it.")] = False,
) -> None:
    """Let a model or adapter belong to one tenant, or to all."""
    with friendly_errors():
        if (tenant is None) != shared:
            raise ConfigError("Give either --tenant NAME or --shared.")
        if tenant is not None:
            check_tenant(tenant)
        Registry.open().assign(name, tenant, by=operator())
        owner = f"belongs to the tenant {tenant}" if tenant else "is shared by all tenants"
        terminal.print(f"{escape(name)} {owner}. An app that serves it as a base follows at its next deployment.")


@models_app.command("merge")
def merge_command(
    adapter: Annotated[
        str, typer.Argument(help="An adapter's name (its newest version), or an id such as my-adapter@2.")
    ],
    name: Annotated[str, typer.Argument(help="What the merged model is called.")],
) -> None:
    """Add an adapter into its base, as a model of its own: what a DoRA adapter needs to be served."""
    with friendly_errors():
        registry = Registry.open()
        record = registry.resolve(adapter)
        if record.kind != "adapter" or record.base is None:
            raise RegistryError(f"{record.id} is a model, not an adapter. `tandem models ls` lists what there is.")
        check_name(name, "model name")
        base = registry.resolve(record.base)
        # Loads PyTorch, which takes seconds: only where it is needed.
        from tandem.train.adapters.merge import merge_adapter

        folder = settings().root / "merged" / f"{name}-{record.id}"
        with terminal.status(f"Merging {record.id} into {base.id}"):
            merge_adapter(base.path, local_folder(record), folder)
        merged = registry.register_model(name, folder, lineage={"merged": record.id, "base": base.id})
        terminal.print(f"[bold]{escape(merged.id)}[/] is {escape(record.id)} merged into {escape(base.id)}.")
        terminal.print(f"serve it: [cyan]tandem serve up {escape(merged.name)}[/]")


def listing(records: list[ModelRecord], now: datetime) -> Table:
    """A table with a row for each record."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    from_hub = any(record.commit for record in records)
    for column in ("NAME", "VERSION", "KIND", "BASE", *(["COMMIT"] if from_hub else []), "LOSS", "CREATED"):
        table.add_column(column, justify="right" if column in ("VERSION", "LOSS") else "left", no_wrap=column == "NAME")
    for record in records:
        kind = f"{'DoRA' if record.dora else 'LoRA'}, rank {record.rank}" if record.kind == "adapter" else "model"
        table.add_row(
            f"[bold]{escape(record.name)}[/]",
            str(record.version),
            kind,
            escape(record.base or "-"),
            *([(record.commit or "-")[:8]] if from_hub else []),
            _loss(record),
            ago(record.created_at, now),
        )
    return table


def details(record: ModelRecord, adapters: list[str], engine_settings: Mapping[str, str], console: Console) -> None:
    """Print everything that is known of a record."""
    there = "" if record.uri or record.path.is_dir() else "  [red](gone)[/]"
    rows = {
        "kind": record.kind,
        "base": record.base,
        "rank": record.rank,
        "max length": record.max_length,
        "created": f"{record.created_at:%Y-%m-%d %H:%M:%S} UTC",
        "digest": record.digest,
        "adapters": ", ".join(adapters) or None,
        **engine_settings,
    }
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("path", f"{escape(record.location)}{there}")
    for key, value in rows.items():
        if value is not None:
            table.add_row(key, escape(str(value)))
    for key, value in record.lineage.items():
        if value is None:
            continue  # such as the evaluation of a run that had none
        table.add_row(escape(key), escape(value if isinstance(value, str) else json.dumps(value)))
    console.print(f"[bold]{escape(record.id)}[/]")
    console.print(table)


def _engine_settings(registry: Registry, record: ModelRecord) -> dict[str, str]:
    """The engine of a model, or of an adapter's base, and what it derives from the files without `engine_args`; empty if no
    engine serves it.
    """
    folder = (registry.resolve(record.base) if record.base else record).path
    try:
        engine = select_engine(AUTO_ENGINE, folder)
    except (ConfigError, RegistryError):
        return {}
    return {"engine": engine.name, **engine.model_features(folder, {}).described}


def as_values(record: ModelRecord) -> dict[str, Any]:
    """A record as JSON can hold it."""
    return {
        "id": record.id,
        "name": record.name,
        "version": record.version,
        "kind": record.kind,
        "path": record.location,
        "digest": record.digest,
        "base": record.base,
        "rank": record.rank,
        "max_length": record.max_length,
        "lineage": record.lineage,
        "created_at": record.created_at.isoformat(),
    }


def ago(then: datetime, now: datetime) -> str:
    """How long since, in the largest unit that fits: `5 minutes ago`."""
    seconds = max(0, int((now - then).total_seconds()))
    for unit, size in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if count := seconds // size:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


def _loss(record: ModelRecord) -> str:
    loss = record.lineage.get("loss")
    return f"{loss:.3f}" if isinstance(loss, int | float) else "-"
