"""Records of stored answers. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any


class AnswerKind(StrEnum):
    """API of a stored answer."""

    RESPONSE = "response"
    CHAT = "chat"


@dataclass(frozen=True, kw_only=True, slots=True)
class NewAnswer:
    """An answer to be stored."""

    id: str
    tenant: str
    kind: AnswerKind
    key_id: str
    model: str
    """As the request named it."""
    answered_model: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    previous_id: str | None = None
    raw_bytes: int
    content: bytes
    """As `stored.content.pack` makes it."""
    lifetime_days: int
    idempotency_key: str | None = None
    """Digest of the key that the request was sent with; the answers of two requests with one key replace each other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredAnswer:
    """A stored answer."""

    id: str
    kind: AnswerKind
    metadata: Mapping[str, str]
    previous_id: str | None
    created_at: datetime
    request: Mapping[str, Any]
    """The body as the client sent it."""
    answer: Mapping[str, Any]
    """The body as the client got it; of a stream, what its events add up to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPage:
    """One page of a list."""

    answers: tuple[StoredAnswer, ...]
    has_more: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """A response and those before it that it goes on from."""

    answers: tuple[StoredAnswer, ...]
    """Oldest first; empty if one is missing, or if they exceed a limit."""
    missing: str | None
    """Id of one that is not stored any more."""
    num_turns: int
    """Responses of the chain, as far as they were counted."""
    raw_bytes: int
    """Bytes of their requests and answers."""
