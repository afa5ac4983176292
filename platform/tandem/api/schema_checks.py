"""JSON schemas that no grammar can be made of, or one that would take all of an engine's memory. Pure.

vLLM's grammar backends (xgrammar, llguidance) fail on the first kind in the middle of an answer, which is a 500. They expand
counts of items and properties one by one: `minItems: 1000000000` takes about 100 GB in the process that serves every client.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote

from tandem.api.walks import path_to

MAX_COUNT = 100_000
"""Largest count of items or properties that a schema may ask for."""
COUNTS = frozenset(("minItems", "maxItems", "minProperties", "maxProperties"))
DATA = ("const", "default", "enum", "examples")
"""Keywords whose values are data, not schemas."""
MARKS = (b"$ref", *(key.encode() for key in sorted(COUNTS)), b"\\u")
"""A body without these has no schema with a problem; `\\u` may write any of the others in another form."""
MAX_SEARCHED = 1 << 20
"""Bytes of a body that is searched for MARKS; in longer ones, which have images, the walk through a schema is cheaper."""


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
                    (*path_to(node, schema), key),
                    f"is {count}; at most {MAX_COUNT} are taken. Lower it, or leave it out",
                )
    if not any("$ref" in node for node in nodes):
        return None  # nothing leads back
    endless = _first_endless(nodes, schema)
    if endless is None:
        return None
    return SchemaProblem(
        path_to(endless, schema),
        "is a schema whose references lead back to itself and describe no value. Put what recurs below `properties` or `items`",
    )


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


def _first_endless(nodes: list[dict[str, Any]], root: Any) -> dict[str, Any] | None:
    """The first schema a value of which would first have to be a value of itself, without end; None: there is none.

    A schema is finite if its reference, each part of its `allOf`, and one choice of its `anyOf` and of its `oneOf` are. Finite
    ones are counted from those without any of these upwards (unit propagation of Horn clauses), so that the number of steps is
    that of the schema's entries, however its references cross.
    """
    known = {id(node): node for node in nodes}
    todo = list(known.values())
    unmet: dict[int, int] = {}
    """Requirements of a schema that are not known to be met, by its identity."""
    needed_by: dict[int, list[tuple[int, list[bool]]]] = {}
    """Schemas that need one, each with whether that requirement is met already."""
    finite: list[int] = []
    for node in todo:
        requirements = _requirements(node, root)
        unmet[id(node)] = len(requirements)
        if not requirements:
            finite.append(id(node))
        for choices in requirements:
            met = [False]
            for choice in choices:
                needed_by.setdefault(id(choice), []).append((id(node), met))
                if id(choice) not in known:
                    known[id(choice)] = choice
                    todo.append(choice)
    for each in finite:
        for user, met in needed_by.get(each, ()):
            if not met[0]:
                met[0] = True
                unmet[user] -= 1
                if not unmet[user]:
                    finite.append(user)
    return next((node for node in todo if unmet[id(node)]), None)


def _requirements(node: dict[str, Any], root: Any) -> list[list[dict[str, Any]]]:
    """Schemas of which values of `node` are values, too: for each requirement the choices, all of which are objects."""
    reference = node.get("$ref")
    every = [_target(root, reference)] if isinstance(reference, str) else []
    every += node["allOf"] if isinstance(node.get("allOf"), list) else []
    found = [[each] for each in every]
    found += [node[key] for key in ("anyOf", "oneOf") if isinstance(node.get(key), list) and node[key]]
    # What is no object (true, text) requires nothing.
    return [choices for choices in found if all(isinstance(each, dict) for each in choices)]


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
