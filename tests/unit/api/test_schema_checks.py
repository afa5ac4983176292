"""Schemas that no engine can answer are found; those that recur below properties or items are not."""

from __future__ import annotations

import time
from typing import Any

import pytest

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
