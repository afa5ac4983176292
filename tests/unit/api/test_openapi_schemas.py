"""The JSON schemas of the model routes are those of vLLM's request and answer models. Run as a program, it prints the file anew.

python tests/unit/api/test_openapi_schemas.py > schemas.json; mv schemas.json platform/tandem/api/openapi_schemas.json
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import tandem.api

FILE = Path(tandem.api.__file__).with_name("openapi_schemas.json")
TEXTS = {"title", "description", "examples"}
"""Keywords of a schema that validate nothing."""
VALUES = {"default", "const", "enum"}
"""Keywords whose values are no schemas."""


def declared() -> dict[str, Any]:
    """The request and answer schema of each route, and the schemas that they refer to. Takes seconds: imports vLLM."""
    from pydantic import TypeAdapter
    from vllm.entrypoints.anthropic import protocol as anthropic
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
    from vllm.entrypoints.pooling.embed.protocol import EmbeddingRequest, EmbeddingResponse
    from vllm.entrypoints.pooling.scoring.protocol import RerankRequest, RerankResponse, ScoreRequest, ScoreResponse
    from vllm.entrypoints.serve.tokenize import protocol as tokenize

    counts = (anthropic.AnthropicCountTokensRequest, anthropic.AnthropicCountTokensResponse)
    score, rerank = (ScoreRequest, ScoreResponse), (RerankRequest, RerankResponse)
    routes: dict[str, tuple[Any, Any]] = {
        "/v1/completions": (CompletionRequest, CompletionResponse),
        "/v1/chat/completions": (ChatCompletionRequest, ChatCompletionResponse),
        "/v1/responses": (ResponsesRequest, ResponsesResponse),
        "/v1/messages": (anthropic.AnthropicMessagesRequest, anthropic.AnthropicMessagesResponse),
        "/v1/messages/count_tokens": counts,
        "/v1/embeddings": (EmbeddingRequest, EmbeddingResponse),
        **dict.fromkeys(("/v1/score", "/score"), score),
        **dict.fromkeys(("/v1/rerank", "/v2/rerank", "/rerank"), rerank),
        "/tokenize": (tokenize.TokenizeRequest, tokenize.TokenizeResponse),
        "/detokenize": (tokenize.DetokenizeRequest, tokenize.DetokenizeResponse),
    }
    inputs = [
        ((path, kind), mode, TypeAdapter(model))
        for path, models in routes.items()
        for kind, mode, model in zip(("request", "answer"), ("validation", "serialization"), models, strict=True)
    ]
    found, shared = TypeAdapter.json_schemas(inputs, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    return {
        "routes": {
            path: {kind: validating(found[(path, kind), mode]) for (at, kind), mode, _ in inputs if at == path}  # type: ignore[index]
            for path in routes
        },
        "schemas": {name: validating(schema) for name, schema in sorted(shared["$defs"].items())},
    }


def validating(schema: Any, *, names: bool = False) -> Any:
    """A schema without texts; `names`: the keys of this object are names of fields."""
    if isinstance(schema, list):
        return [validating(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value
        if key in ("default", "const", "enum") and not names
        else validating(value, names=key == "properties" and not names)
        for key, value in schema.items()
        if names or key not in TEXTS
    }


def text() -> str:
    """The file: a line for each route and each schema."""
    parts = []
    for part, values in declared().items():
        lines = ",\n".join(
            f"{json.dumps(name)}:{json.dumps(value, separators=(',', ':'))}" for name, value in values.items()
        )
        parts.append(f"{json.dumps(part)}:{{\n{lines}\n}}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def test_the_schemas_are_those_of_vllm() -> None:
    # In a process of its own: vLLM changes a process that imports it.
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    printed = done.stdout[done.stdout.index("{\n") :]
    assert json.loads(printed) == json.loads(FILE.read_text())


if __name__ == "__main__":
    print(text(), end="")
