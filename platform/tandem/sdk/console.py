"""Consoles of commands and of the Python API: results on standard output, errors on standard error."""

from __future__ import annotations

from rich.console import Console

console = Console(highlight=False)


errors = Console(stderr=True, highlight=False)

INTERRUPTED = 130
"""Exit status after Ctrl-C."""
