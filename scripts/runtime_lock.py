#!/usr/bin/env python3
"""Prints the part of a lock that an installation needs: without the tools of developers, with all hashes.

The lock says of each package which ones asked for it (`# via`), so no package index is needed. Standard library only: it runs
before anything is installed.

Usage: scripts/runtime_lock.py LOCK [--extra NAME ...]     # Tandem's dependencies and those extras
       scripts/runtime_lock.py LOCK --package NAME ...     # these packages instead, with what they need
       scripts/runtime_lock.py ... --without-installed     # less what this Python has, in whatever version
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)(?:\[[^\]]*\])?==")
OPTION = re.compile(r"^--")


@dataclass(frozen=True)
class Locked:
    """A package of a lock."""

    name: str
    lines: tuple[str, ...]
    via: frozenset[str]
    """Names of the packages that asked for it."""


def normalized(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(text: str) -> dict[str, list[Locked]]:
    """The packages of a lock, by name; several where markers choose between versions."""
    blocks: list[list[str]] = []
    for line in text.splitlines():
        if PACKAGE.match(line):
            blocks.append([line])
        elif blocks and line.startswith(" "):
            blocks[-1].append(line)
    found: dict[str, list[Locked]] = {}
    for lines in blocks:
        match = PACKAGE.match(lines[0])
        assert match is not None
        comments = [line.strip().lstrip("#").strip() for line in lines if line.strip().startswith("#")]
        via = {normalized(word.removeprefix("via").split()[0]) for word in comments if word.removeprefix("via").split()}
        name = normalized(match["name"])
        found.setdefault(name, []).append(Locked(name, tuple(lines), frozenset(via)))
    return found


def closure(packages: dict[str, list[Locked]], roots: set[str]) -> list[Locked]:
    """The packages of `roots`, and all that they need, in the lock's order."""
    children: dict[str, set[str]] = {}
    for name, versions in packages.items():
        for parent in {parent for version in versions for parent in version.via}:
            children.setdefault(parent, set()).add(name)
    needed: set[str] = set()
    waiting = [root for root in roots if root in packages]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += children.get(name, ())
    return [version for name, versions in packages.items() if name in needed for version in versions]


def direct_requirements(extras: list[str]) -> set[str]:
    """Names of the packages that pyproject.toml asks for, in the dependencies and in these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    if unknown := sorted(set(extras) - set(optional)):
        sys.exit(f"pyproject.toml has no extra {', '.join(unknown)}; there are: {', '.join(optional)}.")
    lines = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    return {normalized(re.split(r"[\[<>=!~; ]", line, maxsplit=1)[0]) for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("lock", type=Path)
    parser.add_argument("--extra", action="append", default=[])
    parser.add_argument("--package", action="append", default=[])
    parser.add_argument("--without-installed", action="store_true")
    given = parser.parse_args()
    text = given.lock.read_text()
    packages = read_lock(text)
    roots = {normalized(name) for name in given.package} or direct_requirements(given.extra)
    if given.package and (missing := sorted(roots - set(packages))):
        sys.exit(f"{given.lock} has no {', '.join(missing)}.")
    for line in text.splitlines():
        if OPTION.match(line):
            print(line)
    present = {normalized(each.name) for each in distributions()} if given.without_installed else set()
    for package in closure(packages, roots):
        if package.name not in present:
            print("\n".join(package.lines))


if __name__ == "__main__":
    main()
