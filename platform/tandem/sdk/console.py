"""Consoles of commands and of the Python API: results on standard output, errors on standard error."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

console = Console(highlight=False)


errors = Console(stderr=True, highlight=False)

INTERRUPTED = 130
"""Exit status after Ctrl-C."""


def print_message(text: str) -> None:
    """Print text as it is, on lines as long as it needs."""
    console.print(escape(text), soft_wrap=True)
