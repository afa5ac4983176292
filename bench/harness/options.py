"""Command line options that every benchmark has."""

from __future__ import annotations

import argparse
from pathlib import Path


def options_parser(
    description: str | None, *, smoke: str, check: str = "exit 1 where a bar is missed"
) -> argparse.ArgumentParser:
    """A parser with --json, --check and --smoke; `description`: the module's docstring, `smoke`: description of a smoke run."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here, and as a page beside it")
    parser.add_argument("--check", action="store_true", help=check)
    parser.add_argument("--smoke", action="store_true", help=f"{smoke}: shows that the program runs, measures nothing")
    return parser
