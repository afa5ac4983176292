"""Requests made from OpenAPI documents, against a real engine: none is answered with 5xx.

The documents are the gateway's own and one with OpenAI's published types, which its SDK holds.
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance
from serve_fixtures import Served

EXAMPLES = 12
"""Requests for each operation."""
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")
LONGEST = 16


def affordable(body: Any, model: str) -> Any:
    """The body for a model that is served, with an answer of few tokens where it would be long, and time for it: 504 is right
    where a request's own `timeout` has passed.
    """
    if not isinstance(body, dict):
        return body
    body = {**body, "model": model}
    for name in LENGTHS:
        if isinstance(body.get(name), int) and body[name] > LONGEST:
            body[name] = LONGEST
    if "timeout" in body:
        body["timeout"] = 60
    return body


def ask_all(document: dict[str, Any], url: str, models: dict[str, str], checks: list[Any]) -> dict[str, set[int]]:
    """Send requests of every POST of a document whose path has a model; returns the statuses of each."""
    asked: dict[str, set[int]] = {}

    def ask(operation: Any, model: str) -> None:
        @given(case=operation.as_strategy())
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def answered(case: Any) -> None:
            case.body = affordable(case.body, model)
            response = case.call(base_url=url, timeout=60)
            asked.setdefault(operation.path, set()).add(response.status_code)
            case.validate_response(response, checks=checks)

        answered()

    for result in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = result.ok()
        if operation.method == "post" and operation.path in models:
            ask(operation, models[operation.path])
    return asked


def openai_document() -> dict[str, Any]:
    """OpenAI's types of the routes that exist here too."""
    from openai.types import completion_create_params, embedding_create_params
    from openai.types.chat import completion_create_params as chat_create_params
    from openai.types.responses import response_create_params
    from pydantic import TypeAdapter

    types: dict[str, Any] = {
        "/v1/completions": completion_create_params.CompletionCreateParamsNonStreaming,
        "/v1/chat/completions": chat_create_params.CompletionCreateParamsNonStreaming,
        "/v1/responses": response_create_params.ResponseCreateParamsNonStreaming,
        "/v1/embeddings": embedding_create_params.EmbeddingCreateParams,
    }
    inputs: list[Any] = [(path, "validation", TypeAdapter(each)) for path, each in types.items()]
    found, shared = TypeAdapter.json_schemas(inputs, ref_template="#/components/schemas/{model}")
    paths = {
        path: {
            "post": {
                "requestBody": {"required": True, "content": {"application/json": {"schema": found[path, mode]}}},
                "responses": {"default": {"description": "Any"}},
            }
        }
        for path, mode, _ in inputs
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "OpenAI", "version": "1"},
        "paths": paths,
        "components": {"schemas": shared.get("$defs", {})},
    }


@pytest.mark.timeout(600)
def test_no_request_made_from_the_gateways_document_is_a_server_error(served: Served) -> None:
    document = httpx.get(f"{served.url}/openapi.json", timeout=60).json()
    generating = ("completions", "chat/completions", "responses", "messages", "messages/count_tokens")
    models = {**{f"/v1/{path}": "tiny" for path in generating}, "/tokenize": "tiny", "/detokenize": "tiny"}
    checks = [not_a_server_error, status_code_conformance, content_type_conformance]
    asked = ask_all(document, served.url, models, checks)
    assert set(asked) == set(models)
    # Some requests of most routes were such as an engine answers.
    assert sum(200 in statuses for statuses in asked.values()) >= 3, asked


@pytest.mark.timeout(600)
def test_no_request_that_openai_publishes_is_a_server_error(served: Served) -> None:
    document = openai_document()
    asked = ask_all(document, served.url, dict.fromkeys(document["paths"], "tiny"), [not_a_server_error])
    assert set(asked) == set(document["paths"])
    assert any(200 in statuses for statuses in asked.values()), asked
