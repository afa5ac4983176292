"""The routes of an engine's app that clients reach: one list, for the gateway that offers them and for the guard that lets
nothing else pass. Plain data, cheap to import.
"""

from __future__ import annotations

from dataclasses import dataclass

GENERATE, EMBED, SCORE = "generate", "embed", "score"
"""What an engine does: writes text, turns text into vectors, judges how well two texts fit."""


@dataclass(frozen=True, slots=True)
class EngineRoute:
    """A route that takes a POST of JSON with a `model`."""

    path: str
    task: str | None = None
    """What the engine has to do; None: every engine has the route."""
    light: bool = False
    """Whether it is only about tokens: it needs no place in the engine's batch, and so none in a queue."""


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

INSIDE = frozenset({("GET", "/v1/models"), ("GET", "/health"), ("GET", "/metrics")})
"""What holders of a replica's token may ask its engine besides; the gateway offers none of it."""

ALLOWED = INSIDE | {("POST", route.path) for route in ENGINE_ROUTES}
"""All that the guard lets pass to the engine's app, by method and path."""
