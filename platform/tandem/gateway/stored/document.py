"""Part of the OpenAPI document for stored responses and chat completions. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem.gateway.routes.openapi.operations import (
    AFTER,
    COMPONENTS,
    IDEMPOTENCY_KEY,
    Paths,
    limit,
    path_parameter,
    query,
    with_errors,
)

RESPONSE, COMPLETION = "StoredResponse", "StoredChatCompletion"
RESPONSE_ID, COMPLETION_ID = "response_id", "completion_id"


def stored_schemas() -> dict[str, Any]:
    """The schemas by name."""
    metadata = {"type": "object", "maxProperties": 16, "additionalProperties": {"type": "string", "maxLength": 512}}
    return {
        RESPONSE: _object("response"),
        COMPLETION: _object("chat.completion"),
        **{f"{name}Page": _page(item) for name, item in ((COMPLETION, _ref(COMPLETION)), ("Item", {"type": "object"}))},
        "DeletedResponse": _deleted("response"),
        "DeletedChatCompletion": _deleted("chat.completion.deleted"),
        "MetadataChange": {
            "type": "object",
            "required": ["metadata"],
            "properties": {"metadata": {"anyOf": [metadata, {"type": "null"}]}},
            "additionalProperties": False,
        },
    }


def add_stored_paths(paths: Paths, errors: Mapping[str, Any]) -> None:
    """Add the paths to those of a document; `errors`: the answers with an error that each operation has."""
    response, completion = path_parameter(RESPONSE_ID), path_parameter(COMPLETION_ID)
    filters = [
        query("model", {"type": "string"}),
        {**query("metadata", {"type": "object", "additionalProperties": {"type": "string"}}), "style": "deepObject"},
    ]
    body = {"content": {"application/json": {"schema": _ref("MetadataChange")}}, "required": True}
    added: Paths = {
        f"/v1/responses/{{{RESPONSE_ID}}}": {
            "get": _operation("retrieve_response", RESPONSE, [response]),
            "delete": _operation("delete_response", "DeletedResponse", [response]),
        },
        f"/v1/responses/{{{RESPONSE_ID}}}/input_items": {
            "get": _operation("list_response_input_items", "ItemPage", [response, *_page_parameters("desc")])
        },
        "/v1/chat/completions": {
            "get": _operation("list_chat_completions", f"{COMPLETION}Page", [*_page_parameters("asc"), *filters])
        },
        f"/v1/chat/completions/{{{COMPLETION_ID}}}": {
            "get": _operation("retrieve_chat_completion", COMPLETION, [completion]),
            "post": _operation("update_chat_completion", COMPLETION, [completion]) | {"requestBody": body},
            "delete": _operation("delete_chat_completion", "DeletedChatCompletion", [completion]),
        },
        f"/v1/chat/completions/{{{COMPLETION_ID}}}/messages": {
            "get": _operation("list_chat_completion_messages", "ItemPage", [completion, *_page_parameters("asc")])
        },
    }
    for path in ("/v1/chat/completions", "/v1/responses"):
        paths[path]["post"]["parameters"] = [IDEMPOTENCY_KEY]
    for path, operations in with_errors(added, errors).items():
        paths[path] = paths.get(path, {}) | operations


def _object(name: str) -> dict[str, Any]:
    properties = {"id": {"type": "string"}, "object": {"const": name}}
    return {"type": "object", "required": ["id", "object"], "properties": properties}


def _deleted(name: str) -> dict[str, Any]:
    whole = _object(name)
    return whole | {
        "required": [*whole["required"], "deleted"],
        "properties": {**whole["properties"], "deleted": {"const": True}},
    }


def _page(item: dict[str, Any]) -> dict[str, Any]:
    optional = {"type": ["string", "null"]}
    properties = {
        "object": {"const": "list"},
        "data": {"type": "array", "items": item},
        "first_id": optional,
        "last_id": optional,
        "has_more": {"type": "boolean"},
    }
    return {"type": "object", "required": list(properties), "properties": properties}


def _operation(name: str, answer: str, parameters: list[dict[str, Any]]) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref(answer)}}
    return {
        "operationId": name,
        "parameters": parameters,
        "responses": {"200": {"description": "The answer", "content": content}},
    }


def _page_parameters(order: str) -> list[dict[str, Any]]:
    return [AFTER, limit(20, 100), query("order", {"enum": ["asc", "desc"], "default": order})]


def _ref(name: str) -> dict[str, str]:
    return {"$ref": COMPONENTS + name}
