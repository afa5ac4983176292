"""JSON schemas that no grammar can be made of, or one that would take all of an engine's memory. Pure.

vLLM's grammar backends (xgrammar, llguidance) fail on the first kind in the middle of an answer, which is a 500. They expand
counts of items and properties one by one: `minItems: 1000000000` takes about 100 GB in the process that serves every client.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote

MAX_COUNT = 100_000
"""Largest count of items or properties that a schema may ask for."""
COUNTS = ("minItems", "maxItems", "minProperties", "maxProperties")
DATA = ("const", "default", "enum", "examples")
"""Keywords whose values are data, not schemas."""
MAX_DEPTH = 100
"""References inside each other that are followed."""


class SchemaProblem(NamedTuple):
    """What is wrong, and where."""

    path: tuple[str, ...]
    """Keys from the schema's root."""
    text: str


def schema_problem(schema: Any) -> SchemaProblem | None:
    """The first thing in a schema that an engine cannot answer; None: nothing was found."""
    finished: set[int] = set()
    for path, node in _nodes(schema):
        for key in COUNTS:
            count = node.get(key)
            if isinstance(count, int | float) and count > MAX_COUNT:
                return SchemaProblem(
                    (*path, key), f"is {count}; at most {MAX_COUNT} are taken. Lower it, or leave it out"
                )
        if _leads_back(node, schema, (), finished):
            return SchemaProblem(
                path, "is a schema whose references lead back to itself and describe no value. Put what recurs below "
                "`properties` or `items`",
            )  # fmt: skip
    return None


def _nodes(schema: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every object in a schema with its path."""
    todo: list[tuple[tuple[str, ...], Any]] = [((), schema)]
    while todo:
        path, node = todo.pop()
        if isinstance(node, dict):
            yield path, node
            todo += [((*path, str(key)), value) for key, value in node.items() if key not in DATA]
        elif isinstance(node, list):
            todo += [((*path, str(place)), value) for place, value in enumerate(node)]


def _leads_back(node: Any, root: Any, above: tuple[int, ...], finished: set[int]) -> bool:
    """Whether a value of `node` would first have to be a value of one that it came from, without end."""
    if not isinstance(node, dict) or id(node) in finished:
        return False
    if id(node) in above or len(above) >= MAX_DEPTH:
        return True
    here = (*above, id(node))
    reference = node.get("$ref")
    every = [_target(root, reference)] if isinstance(reference, str) else []
    every += node["allOf"] if isinstance(node.get("allOf"), list) else []
    if any(_leads_back(part, root, here, finished) for part in every):
        return True
    for key in ("anyOf", "oneOf"):
        choices = node.get(key)
        if isinstance(choices, list) and choices and all(_leads_back(each, root, here, finished) for each in choices):
            return True
    finished.add(id(node))
    return False


def _target(root: Any, reference: str) -> Any:
    """What a reference into the same schema means; None for any other, and for one to nothing."""
    if not reference.startswith("#"):
        return None
    node = root
    for part in unquote(reference[1:]).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict):
            node = node.get(key)
        elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            return None
    return node
