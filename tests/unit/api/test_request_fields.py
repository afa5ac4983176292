"""The table of request fields holds what vLLM's routes and the makers' SDKs declare. Run as a program, it prints the table anew.

python tests/unit/api/test_request_fields.py > request_fields.py; mv request_fields.py platform/tandem/api/
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from typing import Any

OURS = {"model", "priority", "timeout", "prompt_cache_key", "user", "safety_identifier"}
"""Fields that the gateway itself reads."""
HEADER = '''"""Top-level fields of requests by route, for the gateway, which imports neither vLLM nor an SDK.

Made by tests/unit/api/test_request_fields.py from vLLM's request models and the typed requests of OpenAI's and Anthropic's SDKs.
"""

from __future__ import annotations

'''
TABLE = (
    "REQUEST_FIELDS: dict[str, frozenset[str]] = {route: frozenset(names.split()) for route, names in _NAMES.items()}"
)


def declared() -> dict[str, list[str]]:
    """Route to field names, as vLLM and the SDKs declare them. Takes seconds: imports vLLM."""
    from anthropic.types import message_count_tokens_params, message_create_params
    from openai.types import completion_create_params, embedding_create_params
    from openai.types.chat import completion_create_params as chat_create_params
    from openai.types.responses import response_create_params
    from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.pooling.embed.protocol import EmbeddingRequest
    from vllm.entrypoints.pooling.scoring.protocol import RerankRequest, ScoreRequest
    from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeRequest

    routes: dict[str, tuple[Any, ...]] = {
        "/v1/completions": (CompletionRequest, completion_create_params.CompletionCreateParamsStreaming),
        "/v1/chat/completions": (ChatCompletionRequest, chat_create_params.CompletionCreateParamsStreaming),
        "/v1/responses": (ResponsesRequest, response_create_params.ResponseCreateParamsStreaming),
        "/v1/messages": (AnthropicMessagesRequest, message_create_params.MessageCreateParamsStreaming),
        "/v1/messages/count_tokens": (
            AnthropicCountTokensRequest,
            message_count_tokens_params.MessageCountTokensParams,
        ),
        "/v1/embeddings": (EmbeddingRequest, embedding_create_params.EmbeddingCreateParams),
        "/v1/score": (ScoreRequest,),
        "/score": (ScoreRequest,),
        "/v1/rerank": (RerankRequest,),
        "/v2/rerank": (RerankRequest,),
        "/rerank": (RerankRequest,),
        "/tokenize": (TokenizeRequest,),
        "/detokenize": (DetokenizeRequest,),
    }
    return {route: sorted(OURS.union(*map(names, types))) for route, types in routes.items()}


def names(declared_type: Any) -> set[str]:
    """The fields of a model, of each of a union, or of a typed dictionary, with their aliases."""
    if fields := getattr(declared_type, "model_fields", None):
        return set(fields) | {str(field.alias) for field in fields.values() if field.alias}
    if parts := getattr(declared_type, "__args__", None):
        return set().union(*map(names, parts))
    return set(declared_type.__required_keys__ | declared_type.__optional_keys__)


def test_the_field_table_matches_vllm_and_the_sdks() -> None:
    from tandem.api.request_fields import REQUEST_FIELDS
    from tandem.engine.routes import ENGINE_ROUTES

    # In a process of its own: this one shall not import vLLM.
    done = subprocess.run([sys.executable, __file__, "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().rpartition("\n")[2]) == {k: sorted(v) for k, v in REQUEST_FIELDS.items()}
    assert set(REQUEST_FIELDS) == {route.path for route in ENGINE_ROUTES}


def module(table: dict[str, list[str]]) -> str:
    """The text of tandem/api/request_fields.py."""
    lines = ["_NAMES = {"]
    for route, fields in table.items():
        text = textwrap.fill(" ".join(fields), 112, break_on_hyphens=False)
        lines += [f'    "{route}": """', textwrap.indent(text, " " * 8), '    """,']
    about = '"""Route to the names that a request to it may have at its top level."""'
    return HEADER + "\n".join([*lines, "}", TABLE, about, ""])


if __name__ == "__main__":
    found = declared()
    sys.stdout.write(json.dumps(found) if "--json" in sys.argv else module(found))
