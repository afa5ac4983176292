"""Schemas that no engine can answer are found; those that recur below properties or items are not."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import pytest

from tandem.api import schema_checks
from tandem.api.schema_checks import schema_problem

LIST: dict[str, Any] = {"type": "object", "properties": {"next": {"$ref": "#"}}}


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"$ref": "#"}, ()),
        ({"allOf": [{"$ref": "#"}]}, ()),
        ({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}, ()),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b~1c"}, "b/c": {"$ref": "#/$defs/a"}}}, ()),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}}, ("$defs", "a")),
        ({"$ref": "#/default", "default": {"$ref": "#"}}, ()),
        ({"type": "array", "items": {"anyOf": [{"allOf": [{}, {"$ref": "#/items"}]}]}}, ("items",)),
    ],
)
def test_references_that_lead_back_to_themselves_are_found(schema: dict[str, Any], path: tuple[str, ...]) -> None:
    problem = schema_problem(schema)
    assert problem is not None and problem.path == path and "lead back to itself" in problem.text


@pytest.mark.parametrize(
    "schema",
    [
        LIST,
        {"type": "array", "items": {"$ref": "#"}},
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"$ref": "#"}}]},
        {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}], "$defs": {"a": {"type": "string"}}},
        {"properties": {"$ref": {"type": "string"}, "maxItems": {"type": "integer"}}},
        {"enum": [{"$ref": "#"}, {"minItems": 10**9}]},
        {"$ref": "#/nowhere"},
        # `b` leads back through one choice of `a`; the other one is a way out for both.
        {
            "allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
            "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}, {"type": "string"}]}, "b": {"$ref": "#/$defs/a"}},
        },
        {"$defs": {f"n{level}": {"$ref": f"#/$defs/n{level + 1}"} for level in range(3000)}},
        {"$ref": "#node", "$defs": {"a": {"$anchor": "node", "type": "string"}}},
        {"anyOf": [{"$ref": "#/anyOf/" + "1" * 5000}]},
        {"$ref": "https://example.com/schema"},
        {"type": "array", "items": {"type": "string"}, "maxItems": 100_000},
        None,
        "text",
    ],
)
def test_a_schema_that_can_be_answered_passes(schema: Any) -> None:
    assert schema_problem(schema) is None


@pytest.mark.parametrize("key", ["minItems", "maxItems", "minProperties", "maxProperties"])
def test_a_count_that_would_fill_the_engines_memory_is_found(key: str) -> None:
    problem = schema_problem({"properties": {"a": {"type": "array", key: 10**9}}})
    assert problem == (("properties", "a", key), "is 1000000000; at most 100000 are taken. Lower it, or leave it out")


def test_many_references_are_followed_once_each() -> None:
    names = [f"n{number}" for number in range(2000)]
    shared = {name: {"anyOf": [{"$ref": f"#/$defs/{names[-1]}"}] * 50} for name in names[:-1]}
    began = time.process_time()
    assert schema_problem({"$defs": {**shared, names[-1]: {"type": "string"}}}) is None
    assert time.process_time() - began < 10


def doubled(levels: int, end: dict[str, Any]) -> dict[str, Any]:
    """A schema with two equal choices at each level, and 2^levels ways to its end."""
    names = [f"n{level}" for level in range(levels)]
    choices = {
        name: {"anyOf": [{"$ref": f"#/$defs/{below}"}, {"$ref": f"#/$defs/{below}"}]}
        for name, below in zip(names, [*names[1:], "end"], strict=True)
    }
    return {"$ref": "#/$defs/n0", "$defs": {**choices, "end": end}}


@pytest.mark.parametrize("levels", [16, 5000])
def test_choices_at_each_level_are_decided_once_each_whether_they_lead_back_or_not(
    levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def counted(node: dict[str, Any], root: Any) -> Any:
        nonlocal steps
        steps += 1
        return requirements(node, root)

    requirements = schema_checks._requirements
    monkeypatch.setattr(schema_checks, "_requirements", counted)
    assert schema_problem(doubled(levels, {"type": "string"})) is None
    problem = schema_problem(doubled(levels, {"$ref": "#/$defs/end"}))
    assert problem is not None and "lead back to itself" in problem.text
    assert steps <= 2 * (3 * levels + 10)


def test_the_path_to_a_finding_takes_no_memory_for_those_that_are_none() -> None:
    schema: Any = [{} for _ in range(20_000)] + [{"maxItems": 10**9}]
    for level in range(20):
        schema = {f"{level}" * 5000: schema}
    tracemalloc.start()
    problem = schema_problem(schema)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert problem is not None and problem.path[-2:] == ("20000", "maxItems") and len(problem.path) == 22
    assert peak_bytes < 10 * 2**20
