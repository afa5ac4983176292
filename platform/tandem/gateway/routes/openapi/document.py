"""OpenAPI document of the whole gateway: model routes, lists of models, files, jobs, health and admin routes, at `/openapi.json`.

The schemas of model routes are those of vLLM's request and answer models (`api/openapi_schemas.json`): what an engine takes.
Caps of an app (`gateway.caps`) are not in it; errors state them. The document is made once, at its first request.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

import tandem.api
from tandem.engine.routes import GENERATE, EngineRoute
from tandem.gateway.dialect import Anthropic, dialect_of
from tandem.gateway.routes.openapi.files import file_paths, file_schemas
from tandem.gateway.routes.openapi.jobs import job_paths, job_schemas
from tandem.gateway.routes.openapi.operations import COMPONENTS, merged, with_errors
from tandem.gateway.routes.openapi.work import work_paths, work_schemas
from tandem.gateway.stored.document import add_stored_paths, stored_schemas

PATH = "/openapi.json"
SCHEMAS = Path(tandem.api.__file__).with_name("openapi_schemas.json")
ERROR, ANTHROPIC_ERROR = "ErrorAnswer", "AnthropicErrorAnswer"
MODEL, MODELS, STATUS = "ListedModel", "ListedModels", "HealthStatus"
SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "basic": {"type": "http", "scheme": "basic"},
}
OWN_SCHEMAS: dict[str, Any] = {
    MODEL: {
        "type": "object",
        "required": ["id", "object", "created", "owned_by"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": "model"},
            "created": {"type": "integer"},
            "owned_by": {"type": "string"},
        },
    },
    MODELS: {
        "type": "object",
        "required": ["object", "data", "has_more"],
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": {"$ref": COMPONENTS + MODEL}},
            "has_more": {"type": "boolean"},
            "last_id": {"type": ["string", "null"]},
        },
    },
    ANTHROPIC_ERROR: {
        "type": "object",
        "required": ["type", "error", "request_id"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            },
            "request_id": {"type": "string"},
        },
    },
    STATUS: {"type": "object", "required": ["status"], "properties": {"status": {"enum": ["ok", "unavailable"]}}},
}
ADDED_FIELDS: dict[str, Any] = {
    "priority": {"type": "integer", "default": 0},
    "timeout": {"type": "number", "exclusiveMinimum": 0},
}
"""Fields of the gateway's own: a lower priority starts sooner; seconds that the whole request may take."""


def document_route(routes: tuple[EngineRoute, ...], administration: FastAPI, prefix: str) -> BaseRoute:
    """The route of the document; `administration` is mounted at `prefix`."""

    @functools.cache
    def document() -> bytes:
        return json.dumps(build(routes, administration, prefix)).encode()

    async def answer(request: Request) -> Response:
        # FastAPI makes its part in some 100 ms.
        return Response(await asyncio.to_thread(document), media_type="application/json")

    return Route(PATH, answer)


def build(routes: tuple[EngineRoute, ...], administration: FastAPI, prefix: str) -> dict[str, Any]:
    """The document."""
    engine_schemas, admin_document = json.loads(SCHEMAS.read_text()), administration.openapi()
    paths: dict[str, Any] = {
        route.path: {"post": engine_operation(route, engine_schemas["routes"][route.path])} for route in routes
    }
    paths |= own_paths() | with_errors(file_paths() | work_paths() | job_paths(), error_responses())
    add_stored_paths(paths, error_responses())
    paths |= {f"{prefix}{path}": operations for path, operations in admin_document["paths"].items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tandem", "version": importlib.metadata.version("tandem")},
        "paths": paths,
        "components": {
            "schemas": merged(
                (
                    engine_schemas["schemas"],
                    admin_document["components"]["schemas"],
                    file_schemas(),
                    work_schemas(),
                    job_schemas(),
                    stored_schemas(),
                    OWN_SCHEMAS,
                )
            ),
            "securitySchemes": SECURITY,
        },
        "security": [{name: []} for name in SECURITY],
    }


def engine_operation(route: EngineRoute, schemas: dict[str, Any]) -> dict[str, Any]:
    """The POST of one model route."""
    request = {"allOf": [schemas["request"], {"type": "object", "required": ["model"], "properties": ADDED_FIELDS}]}
    answers = {"application/json": {"schema": schemas["answer"]}}
    if route.task == GENERATE and not route.light:
        answers["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "operationId": route.path.strip("/").replace("/", "_"),
        "requestBody": {"required": True, "content": {"application/json": {"schema": request}}},
        "responses": {"200": {"description": "The answer", "content": answers}, **error_responses(route.path)},
    }


def own_paths() -> dict[str, Any]:
    """Lists of models and health."""
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    page = [
        {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 1000}},
        {"name": "after", "in": "query", "schema": {"type": "string"}},
    ]
    health = {path: {"get": {**get(STATUS), "security": []}} for path in ("/health", "/health/live", "/health/ready")}
    return {
        "/v1/models": {"get": {**get(MODELS), "parameters": page}},
        "/v1/models/{name}": {"get": {**get(MODEL), "parameters": [name]}},
        **health,
    }


def get(schema: str) -> dict[str, Any]:
    """A GET that answers with a schema."""
    content = {"application/json": {"schema": {"$ref": COMPONENTS + schema}}}
    health = {"503": {"description": "Unavailable", "content": content}} if schema == STATUS else {}
    return {"responses": {"200": {"description": "The answer", "content": content}, **error_responses(), **health}}


def error_responses(path: str = "") -> dict[str, Any]:
    """Answers with an error, in the shape of the API that a path belongs to."""
    schema = ANTHROPIC_ERROR if isinstance(dialect_of(path), Anthropic) else ERROR
    content = {"application/json": {"schema": {"$ref": COMPONENTS + schema}}}
    return {status: {"description": "An error", "content": content} for status in ("4XX", "5XX")}
