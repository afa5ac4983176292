"""Reports of benchmarks: tables for the terminal and in Markdown, and verdicts on figures that have a bar."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Verdict(NamedTuple):
    """Comparison of a figure with its bar."""

    met: bool
    share: float
    """Share of the bar that was reached; below 1 it is missed."""
    message: str

    def __str__(self) -> str:
        return f"{self.message}: {'met' if self.met else 'MISSED'}."


def show(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, names: int = 1, width: int = 120
) -> None:
    """Print a table, whose first columns, `names` of them, are words."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < names else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=width).print(table)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The table in Markdown."""
    heads = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*heads, *("| " + " | ".join(row) + " |" for row in rows)])


def verdict_lines(verdicts: Iterable[Verdict]) -> str:
    """The verdicts as a Markdown list."""
    return "\n".join(f"- {verdict}" for verdict in verdicts)


def write(path: Path | None, results: Any, page: str) -> None:
    """Write the figures to `path`, if one was given, and the page beside it."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        path.with_suffix(".md").write_text(page)


class Rounds(list[Any]):
    """Results of rounds, each written to `path`, if one was given, as it is appended, so that an interrupted run keeps them.

    Until the run ends, the file holds `{"unfinished": true, "rounds": [...]}`; `write` replaces it with the whole report.
    """

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self._path = path

    def append(self, result: Any) -> None:
        """Keep one round's results, in the file too."""
        super().append(result)
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps({"unfinished": True, "rounds": self}, indent=1) + "\n")


def judge(verdicts: Iterable[Verdict], *, check: bool) -> int:
    """Print the verdicts, the one that is furthest below its bar last; the exit status: 1 if one is missed and `check` is set."""
    ordered = sorted(verdicts, key=lambda verdict: (not verdict.met, -verdict.share))
    for verdict in ordered:
        print(verdict)
    return int(check and not all(verdict.met for verdict in ordered))
