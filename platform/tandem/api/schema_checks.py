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
COUNT_KEYWORDS = frozenset(("minItems", "maxItems", "minProperties", "maxProperties"))
DATA_KEYWORDS = ("const", "default", "enum", "examples")
"""Keywords whose values are data, not schemas."""
PROBLEM_MARKERS = (b"$ref", *(key.encode() for key in sorted(COUNT_KEYWORDS)), b"\\u")
"""A body without these has no schema with a problem; `\\u` may write any of the others in another form."""
MAX_SEARCHED = 1 << 20
"""Bytes of a body that is searched for PROBLEM_MARKERS; in longer ones, with images, the walk through a schema is cheaper."""


class SchemaProblem(NamedTuple):
    """A problem of a schema, with its place."""

    path: tuple[str, ...]
    """Keys from the schema's root."""
    text: str


def may_have_problem(raw: bytes) -> bool:
    """Whether a body in bytes may have a schema with a problem."""
    return len(raw) > MAX_SEARCHED or any(marker in raw for marker in PROBLEM_MARKERS)


def schema_problem(schema: Any) -> SchemaProblem | None:
    """The first problem of a schema; None: there is none."""
    nodes = list(_nodes(schema))
    for node in nodes:
        for key in COUNT_KEYWORDS.intersection(node):
            count = node[key]
            if isinstance(count, int | float) and count > MAX_COUNT:
                return SchemaProblem(
                    (*path_to(node, schema), key),
                    f"is {count}; at most {MAX_COUNT} are taken. Lower it, or leave it out",
                )
    if not any("$ref" in node for node in nodes):
        return None  # without references there is no cycle
    endless = _first_endless(nodes, schema)
    if endless is None:
        return None
    return SchemaProblem(
        path_to(endless, schema),
        "is a schema whose references lead back to itself and describe no value. Put what recurs below `properties` or `items`",
    )


def _nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """Every object in a schema."""
    stack = [schema]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            yield node
            for key, value in node.items():
                if type(value) in (dict, list) and key not in DATA_KEYWORDS:
                    stack.append(value)
        elif isinstance(node, list):
            stack += node


def _first_endless(nodes: list[dict[str, Any]], root: Any) -> dict[str, Any] | None:
    """The first schema a value of which would first have to be a value of itself, without end; None: there is none.

    A schema is finite if its reference, each part of its `allOf`, and one choice of its `anyOf` and of its `oneOf` are. Finite
    ones are counted from those without any of these upwards (unit propagation of Horn clauses), so that the number of steps is
    that of the schema's entries, however its references cross.
    """
    seen_nodes = {id(node): node for node in nodes}
    node_queue = list(seen_nodes.values())
    num_unmet: dict[int, int] = {}
    """Requirements of a schema that are not known to be met, by its identity."""
    needed_by: dict[int, list[tuple[int, list[bool]]]] = {}
    """Schemas that need one, each with whether that requirement is met already."""
    finite: list[int] = []
    for node in node_queue:
        requirements = _requirements(node, root)
        num_unmet[id(node)] = len(requirements)
        if not requirements:
            finite.append(id(node))
        for choices in requirements:
            is_met = [False]
            for choice in choices:
                needed_by.setdefault(id(choice), []).append((id(node), is_met))
                if id(choice) not in seen_nodes:
                    seen_nodes[id(choice)] = choice
                    node_queue.append(choice)
    for finite_id in finite:
        for user_id, is_met in needed_by.get(finite_id, ()):
            if not is_met[0]:
                is_met[0] = True
                num_unmet[user_id] -= 1
                if not num_unmet[user_id]:
                    finite.append(user_id)
    return next((node for node in node_queue if num_unmet[id(node)]), None)


def _requirements(node: dict[str, Any], root: Any) -> list[list[dict[str, Any]]]:
    """Schemas of which values of `node` are values, too: for each requirement the choices, all of which are objects."""
    reference = node.get("$ref")
    all_of = [_target(root, reference)] if isinstance(reference, str) else []
    all_of += node["allOf"] if isinstance(node.get("allOf"), list) else []
    requirements = [[choice] for choice in all_of]
    requirements += [node[key] for key in ("anyOf", "oneOf") if isinstance(node.get(key), list) and node[key]]
    # What is no object (true, text) requires nothing.
    return [choices for choices in requirements if all(isinstance(choice, dict) for choice in choices)]


def _target(root: Any, reference: str) -> Any:
    """The target of a JSON pointer into the same schema (`#`, `#/...`); None for other references and without a target."""
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
