"""Fan-out: the number of sequences that a request starts in an engine. Pure.

`{"prompt": ["a", "b"], "n": 16}` is one HTTP request and 32 sequences, each with a place of its own in the engine's batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem.api.values import is_integer

PROMPTS = {
    "/v1/completions": ("prompt", "prompt_embeds"),
    "/v1/embeddings": ("input",),
    **dict.fromkeys(("/v1/score", "/score"), ("text_1", "queries", "data_1", "text_2", "documents", "items", "data_2")),
    **dict.fromkeys(("/v1/rerank", "/v2/rerank", "/rerank"), ("query", "documents")),
}
"""Fields with several prompts or texts, by route; all other routes have one conversation."""
WIDTHS = {
    "/v1/completions": ("n", "best_of"),
    "/v1/chat/completions": ("n",),
}
"""Fields with the number of sequences for each prompt, by route."""


def fan_out(path: str, body: Mapping[str, Any]) -> int:
    """Sequences that a request to the route `path` starts: prompts x n; 1 for a body that no engine takes.

    Of scores and rankings each text counts, as an engine encodes queries and documents one by one.
    """
    return prompts(path, body) * width(path, body)


def prompts(path: str, body: Mapping[str, Any]) -> int:
    """Prompts, or texts to encode, in a request."""
    return max(1, sum(_count(body.get(field)) for field in PROMPTS.get(path, ())))


def width(path: str, body: Mapping[str, Any]) -> int:
    """Sequences for each prompt."""
    return max((1, *(to_integer(body.get(field)) for field in WIDTHS.get(path, ()))))


def to_integer(value: Any) -> int:
    """A whole number, also one that is given as text, as vLLM takes it; 0 for anything else."""
    if value is None:
        return 0
    if isinstance(value, int):
        return int(value)
    return int(float(value)) if is_integer(value) else 0


def _count(value: Any) -> int:
    """Prompts in a field: text is one, a list of token ids is one, any other list has one in each entry."""
    if value is None:
        return 0
    if isinstance(value, list):
        return 1 if value and isinstance(value[0], int) else len(value)
    if isinstance(value, dict) and isinstance(value.get("content"), list):
        return len(value["content"])  # a text of several parts, in scores
    return 1
