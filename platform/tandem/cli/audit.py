"""`tandem audit`: who changed what, and which credentials were refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from tandem.auth.audit_log import AuditEntry, AuditLog
from tandem.cli.support.shell import friendly_errors
from tandem.errors import ConfigError
from tandem.sdk.console import console
from tandem.sdk.keys import duration


def audit_command(
    since: Annotated[
        str | None, typer.Option(help="Not older than: 90s, 15m, 12h, 30d, or a time such as 2026-11-30T08:00.")
    ] = None,
    action: Annotated[
        str | None, typer.Option(help="Only an action such as keys.create, or a group: keys, adapters, credentials.")
    ] = None,
    by: Annotated[str | None, typer.Option(help="Only what this key or user@host did.")] = None,
    after: Annotated[int | None, typer.Option(min=1, help="Only entries older than the one with this number.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Show at most so many.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the audit log, newest first: changes of keys and adapters, and refused credentials."""
    with friendly_errors():
        start = None if since is None else moment(since, datetime.now(UTC))
        found = AuditLog.open().page(after=after, limit=limit + 1, since=start, action=action, by=by)
        shown = found[:limit]
        if as_json:
            console.print_json(json.dumps([entry.to_json() for entry in shown]))
        elif not shown:
            console.print("The audit log has no such entry.")
        else:
            console.print(_table(shown))
            if len(found) > limit:
                console.print(f"[dim]There are more: --after {shown[-1].id}[/]")


def moment(text: str, now: datetime) -> datetime:
    """The time of a duration such as 12h before `now`, or of ISO 8601, without a zone in UTC; ConfigError for others."""
    try:
        return now - duration(text)
    except ConfigError:
        try:
            found = datetime.fromisoformat(text)
        except ValueError:
            raise ConfigError(f"{text[:40]!r} is no time. Give 90s, 15m, 12h, 30d or 2026-11-30T08:00.") from None
    except OverflowError:
        raise ConfigError(f"{text[:40]!r} is before the first year. Give a shorter time.") from None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _table(entries: list[AuditEntry]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("TIME (UTC)", "WHO", "ACTION", "TARGET", "FROM", "CHANGE"):
        table.add_column(column, overflow="fold")
    for entry in entries:
        cells = (f"{entry.at:%Y-%m-%d %H:%M:%S}", entry.by or "-", entry.action, entry.target, entry.address or "-")
        table.add_row(*map(escape, (*cells, changed(entry.before, entry.after) or "-")))
    return table


def changed(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """The values that differ, as `key: before -> after`, or `key: value` where there is nothing before."""
    old, new = before or {}, after or {}
    lines = []
    for key, value in new.items():
        if before is None or key not in old:
            if value not in (None, [], {}):
                lines.append(f"{key}: {_short(value)}")
        elif old[key] != value:
            lines.append(f"{key}: {_short(old[key])} -> {_short(value)}")
    return ", ".join(lines)


def _short(value: Any) -> str:
    text = "-" if value in (None, [], {}) else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
