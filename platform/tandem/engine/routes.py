"""HTTP routes of engines that clients may reach; the gateway offers them, and the guard of a replica lets no others pass."""

from __future__ import annotations

from dataclasses import dataclass

GENERATE, EMBED, SCORE = "generate", "embed", "score"
"""Tasks of an engine: write text, turn text into vectors, score pairs of texts."""


@dataclass(frozen=True, slots=True)
class EngineRoute:
    """A route that takes a POST of JSON with a `model`."""

    path: str
    task: str | None = None
    """Task that the engine must be able to do; None: every engine has the route."""
    light: bool = False
    """Whether it counts or converts tokens only: it needs no place in the engine's batch, and has a queue of its own."""


ENGINE_ROUTES = (
    EngineRoute("/v1/completions", GENERATE),
    EngineRoute("/v1/chat/completions", GENERATE),
    EngineRoute("/v1/responses", GENERATE),
    EngineRoute("/v1/messages", GENERATE),
    EngineRoute("/v1/messages/count_tokens", GENERATE, light=True),
    EngineRoute("/v1/embeddings", EMBED),
    EngineRoute("/v1/score", SCORE),
    EngineRoute("/score", SCORE),
    EngineRoute("/v1/rerank", SCORE),
    EngineRoute("/v2/rerank", SCORE),
    EngineRoute("/rerank", SCORE),
    EngineRoute("/tokenize", light=True),
    EngineRoute("/detokenize", light=True),
)
"""All routes that any engine here has; a descriptor lists those of its engine."""

INTERNAL_ROUTES = frozenset({("GET", "/v1/models"), ("GET", "/health"), ("GET", "/metrics")})
"""Routes of an engine's app for holders of the replica's token; the gateway does not offer them."""

ALLOWED = INTERNAL_ROUTES | {("POST", route.path) for route in ENGINE_ROUTES}
"""Methods and paths that the guard of a replica lets pass to the engine's app."""
