"""`tandem usage`: requests and tokens by key, tenant, model, adapter, route and time."""

from __future__ import annotations

import csv
import json
import sys
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from tandem.cli.audit import moment
from tandem.cli.support.shell import friendly_errors
from tandem.sdk.app_client import Client
from tandem.sdk.console import console
from tandem.settings import settings
from tandem.usage import UsageStore
from tandem.usage.store import COUNTS, GROUPS

HEADINGS = {
    "key_id": "KEY",
    "prompt_tokens": "PROMPT TOKENS",
    "completion_tokens": "COMPLETION TOKENS",
    "estimated_requests": "ESTIMATED",
}


def usage_command(
    by: Annotated[
        str, typer.Option(help=f"Columns to group by, with commas: {', '.join(GROUPS)}.")
    ] = "tenant,key_id,model",
    since: Annotated[
        str, typer.Option(help="From the hour of: 90m, 12h, 30d ago, or a time such as 2026-11-30T08:00.")
    ] = "30d",
    until: Annotated[str | None, typer.Option(help="To, in the same forms; without: now.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant.")] = None,
    api_url: Annotated[
        str | None, typer.Option(help="Ask this app instead of the database; TANDEM_API_URL. A key sees its tenant.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="The app's key; TANDEM_API_KEY.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how many requests were answered and how many tokens they had.

    Counts are kept by the hour (UTC), and are complete some seconds after a request has ended. ESTIMATED requests are those whose
    engine was killed: they count what had arrived.
    """
    with friendly_errors():
        now = datetime.now(UTC)
        columns = [column.strip() for column in by.split(",") if column.strip()]
        start, end = moment(since, now), None if until is None else moment(until, now)
        if api_url or settings().api_url:
            with Client(api_url, api_key=api_key) as client:
                rows = list(client.usage(columns, since=start, until=end, tenant=tenant))
        else:
            rows = UsageStore.open().sums(columns, since=start, until=end, tenant=tenant)
        if as_json:
            console.print_json(json.dumps(rows))
        elif as_csv:
            writer = csv.DictWriter(sys.stdout, [*columns, *COUNTS])
            writer.writeheader()
            writer.writerows(rows)
        elif not any(row["requests"] for row in rows):
            console.print("No request was answered in that time.")
        else:
            console.print(_table(columns, rows))


def _table(columns: list[str], rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(HEADINGS.get(column, column.upper()), overflow="fold")
    for count in COUNTS:
        table.add_column(HEADINGS.get(count, count.upper()), justify="right")
    for row in rows:
        cells = [escape(str(row[column])) or "-" for column in columns]
        table.add_row(*cells, *(f"{row[count]:,}" for count in COUNTS))
    return table
