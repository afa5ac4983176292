"""Parts of OpenAPI operations: bodies and answers by wire model, parameters, and the schemas of the models. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

COMPONENTS = "#/components/schemas/"
IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "Sent again with the same key, the request makes nothing new",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}
AFTER = {"name": "after", "in": "query", "schema": {"type": "string"}}

Model = type[BaseModel]
Paths = dict[str, dict[str, Any]]


def schemas_of(bodies: Iterable[Model], answers: Iterable[Model]) -> dict[str, Any]:
    """The schemas by name of models that requests have as bodies, and of those that answers are."""
    models: list[Any] = [(model, "validation") for model in bodies]
    models += [(model, "serialization") for model in answers]
    _, found = models_json_schema(models, ref_template=COMPONENTS + "{model}")
    return dict(found["$defs"])


def merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The entries of all parts; ValueError where two parts have different entries of one name."""
    entries: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if entries.setdefault(name, value) != value:
                raise ValueError(f"Two parts of the OpenAPI document have different entries named {name}.")
    return entries


def operation(
    name: str, answer: Model, *, body: Model | None = None, parameters: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """An operation that takes a JSON body, or none, and answers with one JSON object."""
    described: dict[str, Any] = {
        "operationId": name,
        "parameters": list(parameters),
        "responses": {"200": {"description": "The answer", "content": json_content(answer)}},
    }
    if body is not None:
        described["requestBody"] = {"required": True, "content": json_content(body)}
    return described


def json_content(model: Model) -> dict[str, Any]:
    """Content that is a model as JSON."""
    return {"application/json": {"schema": reference(model)}}


def reference(model: Model) -> dict[str, str]:
    """The reference to a model's schema."""
    return {"$ref": COMPONENTS + model.__name__}


def path_parameter(name: str) -> dict[str, Any]:
    """A part of the path."""
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def query(name: str, schema: dict[str, Any], description: str | None = None) -> dict[str, Any]:
    """An optional query parameter."""
    described = {} if description is None else {"description": description}
    return {"name": name, "in": "query", "schema": schema, **described}


def limit(default: int, most: int) -> dict[str, Any]:
    """The query parameter of a page's length."""
    return query("limit", {"type": "integer", "minimum": 1, "maximum": most, "default": default})


def stream(description: str) -> dict[str, Any]:
    """The query parameter by which an answer is server-sent events."""
    return query("stream", {"type": "boolean", "default": False}, description)


def with_errors(paths: Paths, errors: Mapping[str, Any]) -> Paths:
    """The paths with answers that are errors in each operation."""
    for operations in paths.values():
        for described in operations.values():
            described["responses"] |= errors
    return paths
