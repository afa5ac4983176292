"""Depth-first walk through a JSON value in constant memory for each level, and the path to a part of it. Pure.

A path for each value of a body would take quadratic memory: `{"K": {"K": [{}, {}, ...]}}` with long keys holds all of them in the
path of each `{}`. Checks look for findings without paths, and make one for a finding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

LONGEST_PATH = 200
"""Characters of a path in a message; its keys are the client's, of any length."""


def containers(root: Any) -> Iterator[tuple[list[str | int], Any]]:
    """Every object and list in a value, itself included, and the keys that lead to it: a list that the next step changes."""
    if not isinstance(root, dict | list):
        return
    path: list[str | int] = []
    yield path, root
    levels = [_entries(root)]
    while levels:
        for key, value in levels[-1]:
            if isinstance(value, dict | list):
                path.append(key)
                yield path, value
                levels.append(_entries(value))
                break
        else:
            levels.pop()
            if path:
                path.pop()


def path_to(container: Any, root: Any) -> tuple[str, ...]:
    """Keys from a value to one of the objects and lists in it, which is found by identity; empty for itself."""
    return next((tuple(map(str, path)) for path, value in containers(root) if value is container), ())


def dotted(keys: Iterable[str | int]) -> str:
    """A path as messages have it: `tools.0.parameters`; the end of a long one is left out."""
    text = ".".join(map(str, keys))
    return text if len(text) <= LONGEST_PATH else f"{text[: LONGEST_PATH - 4]} ..."


def _entries(value: Any) -> Iterator[tuple[str | int, Any]]:
    return iter(value.items()) if isinstance(value, dict) else iter(enumerate(value))
