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
COUNTS = frozenset(("minItems", "maxItems", "minProperties", "maxProperties"))
DATA = ("const", "default", "enum", "examples")
"""Keywords whose values are data, not schemas."""
MARKS = (b"$ref", *(key.encode() for key in sorted(COUNTS)), b"\\u")
"""A body without these has no schema with a problem; `\\u` may write any of the others in another form."""
MAX_SEARCHED = 1 << 20
"""Bytes of a body that is searched for MARKS; in longer ones, which have images, the walk through a schema is cheaper."""
MAX_DEPTH = 100
"""References inside each other that are followed."""


class SchemaProblem(NamedTuple):
    """What is wrong, and where."""

    path: tuple[str, ...]
    """Keys from the schema's root."""
    text: str


def may_have_problem(raw: bytes) -> bool:
    """Whether a body in bytes may have a schema with a problem."""
    return len(raw) > MAX_SEARCHED or any(mark in raw for mark in MARKS)


def schema_problem(schema: Any) -> SchemaProblem | None:
    """The first thing in a schema that an engine cannot answer; None: nothing was found."""
    nodes = list(_nodes(schema))
    for node in nodes:
        for key in COUNTS.intersection(node):
            count = node[key]
            if isinstance(count, int | float) and count > MAX_COUNT:
                return SchemaProblem(
                    (*_path_of(node, schema), key),
                    f"is {count}; at most {MAX_COUNT} are taken. Lower it, or leave it out",
                )
    if not any("$ref" in node for node in nodes):
        return None  # nothing leads back
    finished: set[int] = set()
    for node in nodes:
        if _leads_back(node, schema, (), finished):
            return SchemaProblem(
                _path_of(node, schema),
                "is a schema whose references lead back to itself and describe no value. Put what recurs below `properties` "
                "or `items`",
            )
    return None


def _nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """Every object in a schema."""
    todo = [schema]
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            yield node
            for key, value in node.items():
                if type(value) in (dict, list) and key not in DATA:
                    todo.append(value)
        elif isinstance(node, list):
            todo += node


def _path_of(wanted: dict[str, Any], schema: Any) -> tuple[str, ...]:
    """Keys from the schema's root to one of its objects; made for findings only, as they take most of the time."""
    todo: list[tuple[tuple[str, ...], Any]] = [((), schema)]
    while todo:
        path, node = todo.pop()
        if node is wanted:
            return path
        if isinstance(node, dict):
            todo += [((*path, str(key)), value) for key, value in node.items() if key not in DATA]
        elif isinstance(node, list):
            todo += [((*path, str(place)), value) for place, value in enumerate(node)]
    return ()


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
    """What a JSON pointer into the same schema (`#`, `#/...`) means; None for other references, and for one to nothing."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    node = root
    for part in unquote(reference[1:]).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict):
            node = node.get(key)
        elif isinstance(node, list) and key.isdecimal() and len(key) < 10 and int(key) < len(node):
            node = node[int(key)]
        else:
            return None
    return node
