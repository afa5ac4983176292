"""Findings of `tandem doctor` in the terminal: one row each, with the next step below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    """ok, note (works; worth knowing), or problem (something will fail)."""
    says: str
    fix: str = ""
    """What to do about it; every problem has one."""


def show_findings(console: Console, findings: Sequence[Finding]) -> int:
    """Print findings as a table. Returns 1 if there is a problem, else 0."""
    problems = sum(finding.state == "problem" for finding in findings)
    console.print(findings_table(findings))
    if problems:
        console.print(f"\n[red]{problems} {'problem' if problems == 1 else 'problems'}[/]; each arrow says what to do.")
    else:
        console.print("\n[green]All right.[/]")
    return int(problems > 0)


def findings_table(findings: Sequence[Finding]) -> Table:
    """A row for each finding."""
    table = Table(box=None, padding=(0, 1), show_header=False)
    table.add_column()
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark = {"ok": "[green]✓[/]", "note": "[yellow]![/]", "problem": "[red]✗[/]"}[finding.state]
        table.add_row(mark, finding.name, escape(finding.says))
        if finding.fix:
            table.add_row("", "", f"[cyan]→ {escape(finding.fix)}[/]")
    return table
