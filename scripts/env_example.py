#!/usr/bin/env python3
"""Writes .env.example: every setting of platform/tandem/settings.py, with its description and its default.

Usage: scripts/env_example.py [--check]     # --check changes nothing, and fails where the file differs
"""

from __future__ import annotations

import ast
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE, TARGET = ROOT / "platform" / "tandem" / "settings.py", ROOT / ".env.example"
HEAD = """\
# Settings of Tandem: every variable that it reads, with its default. `make env-example` writes this file from settings.py.
# Copy it to .env, which git ignores, and change what is to differ: compose.yaml gives it to the container. The nodes of a cluster
# have theirs in deploy/tandem.env. A variable that is empty counts as unset. Passwords do not belong here: the container reads
# TANDEM_DATABASE_URL, TANDEM_API_KEY and TANDEM_ADMIN_TOKEN from a file, too, that NAME_FILE names.
"""
DEFAULTS = {"home": "~/.tandem", "cache": "~/.cache/tandem"}
"""What a default that is computed comes to; the image has others."""


def settings() -> list[tuple[str, str, str]]:
    """Variable, default and description of each setting."""
    tree = ast.parse(SOURCE.read_text())
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Settings")
    rows = []
    for field, after in zip(found.body, found.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), (
            f"{field.target.id} has no description"
        )
        name, default = _name_and_default(field.target.id, field.value)
        rows.append((name, default, " ".join(str(after.value.value).split())))
    return rows


def _name_and_default(field: str, value: ast.expr | None) -> tuple[str, str]:
    arguments = {}
    if isinstance(value, ast.Call):
        arguments = {each.arg: each.value for each in value.keywords}
        value = arguments.get("default") or (value.args[0] if value.args else None)
    alias = arguments.get("validation_alias")
    name = str(alias.value) if isinstance(alias, ast.Constant) else f"TANDEM_{field.upper()}"
    default = value.value if isinstance(value, ast.Constant) else None
    return name, DEFAULTS.get(field, "" if default is None else str(default))


def render() -> str:
    """The file's text."""
    parts = [HEAD]
    for name, default, says in settings():
        described = textwrap.wrap(says.replace("`", ""), 126, initial_indent="# ", subsequent_indent="# ")
        parts.append("\n".join([*described, f"#{name}={default}"]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    if "--check" not in sys.argv:
        TARGET.write_text(render())
    elif TARGET.read_text() != render():
        sys.exit(f"{TARGET.name} is not what settings.py says. Run `make env-example`.")
