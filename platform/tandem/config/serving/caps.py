"""Caps on requests: the most that one request may ask an engine for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from tandem.config import check

KIB = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestCaps:
    """Largest values of a request's fields; a request above one gets 400 before it is admitted."""

    n: int = 16
    """`n`, `best_of`, and the width of a beam search: sequences for each prompt."""
    sequences: int = 128
    """Sequences of a request that generates: prompts x n. Each takes one of the model's admission slots."""
    inputs: int = 2048
    """Texts of a request for embeddings, scores or a ranking; OpenAI's own limit. Each takes an admission slot."""
    logprobs: int = 20
    """`logprobs`, `top_logprobs` and `prompt_logprobs`: alternatives for each token; -1: up to the engine's own limit."""
    stop: int = 16
    """Texts in `stop` or `stop_sequences`; vLLM's own limit (VLLM_MAX_STOP_STRINGS) is 4 unless a model's `env` raises it."""
    stop_chars: int = 1024
    """Characters of one such text."""
    listed: int = 1024
    """Entries of `stop_token_ids`, `bad_words`, `logit_bias` and `logprob_token_ids`."""
    messages: int = 4096
    """Messages of a conversation, or items of `input`."""
    tools: int = 128
    """Tools that a request offers the model."""
    schema_bytes: int = 64 * KIB
    """Length as JSON of one grammar, regular expression, list of choices or JSON schema that an answer follows, and of one
    tool."""
    light_bytes: int = 1024 * KIB
    """Body of a request that counts or converts tokens (`/tokenize`, `/detokenize`, `/v1/messages/count_tokens`), in bytes."""

    def __post_init__(self) -> None:
        for f in fields(self):
            check.at_least(f"gateway.caps.{f.name}", getattr(self, f.name), -1 if f.name == "logprobs" else 1)
