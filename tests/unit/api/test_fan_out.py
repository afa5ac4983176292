"""Sequences that a request starts in an engine."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.api.fan_out import fan_out

CASES: list[tuple[str, dict[str, Any], int]] = [
    ("/v1/completions", {"prompt": "a"}, 1),
    ("/v1/completions", {"prompt": "a", "n": 16}, 16),
    ("/v1/completions", {"prompt": ["a", "b", "c"], "n": 4}, 12),
    ("/v1/completions", {"prompt": [1, 2, 3]}, 1),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "n": 2}, 4),
    ("/v1/completions", {"prompt": "a", "best_of": 5, "n": 2}, 5),
    ("/v1/completions", {"prompt": "a", "n": "16384"}, 16384),
    ("/v1/completions", {"prompt": "a", "n": 8, "use_beam_search": True}, 8),
    ("/v1/completions", {"prompt": ["a"], "prompt_embeds": ["x", "y"]}, 3),
    ("/v1/completions", {"prompt": []}, 1),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 5}, 1),
    ("/v1/chat/completions", {"messages": [], "n": 7}, 7),
    ("/v1/responses", {"input": ["a", "b"], "n": 7}, 1),
    ("/v1/messages", {"messages": [], "n": 7}, 1),
    ("/v1/embeddings", {"input": ["a", "b"]}, 2),
    ("/v1/embeddings", {"input": [1, 2, 3]}, 1),
    ("/v1/embeddings", {"input": "a"}, 1),
    ("/v1/embeddings", {"messages": []}, 1),
    ("/v1/score", {"text_1": "a", "text_2": ["b", "c"]}, 3),
    ("/v1/rerank", {"query": "a", "documents": ["b", "c", "d"]}, 4),
    ("/tokenize", {"prompt": "a", "n": 9}, 1),
    ("/v1/completions", {"prompt": {"a": 1}, "n": "many"}, 1),
]


@pytest.mark.parametrize(("path", "body", "sequences"), CASES)
def test_fan_out_is_prompts_times_n(path: str, body: dict[str, Any], sequences: int) -> None:
    assert fan_out(path, body) == sequences
