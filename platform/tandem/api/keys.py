"""Wire models of the routes that manage API keys."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

RoleName = Literal["admin", "trainer", "user"]
DAY_S = 86_400
MOST_S = 36_500 * DAY_S
"""Longest time in these bodies, in seconds: 100 years."""


class KeyLimits(BaseModel):
    """Limits of a key; those that are not set do not limit."""

    model_config = ConfigDict(extra="forbid", strict=True)

    requests_per_minute: int | None = Field(default=None, ge=0)
    tokens_per_minute: int | None = Field(default=None, ge=0)
    concurrent_requests: int | None = Field(default=None, ge=0)
    tokens_per_day: int | None = Field(default=None, ge=0)
    highest_priority: int | None = Field(
        default=None, description="the most urgent `priority` of a request; lower comes first; null: the tenant's, or 0"
    )


class KeyCreation(BaseModel):
    """Body of a creation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=96, description="who or what uses the key")
    tenant: str = Field(default="default", min_length=1, max_length=63, description="whose limits and usage it shares")
    role: RoleName = Field(default="user", description="what it may do")
    models: list[str] = Field(
        default_factory=list, max_length=1000, description="models and adapters that it may use; empty: all"
    )
    limits: KeyLimits = Field(default_factory=KeyLimits)
    expires_in_s: int | None = Field(
        default=None, ge=1, le=MOST_S, description="seconds after which it ends; without: never"
    )


class KeyRotation(BaseModel):
    """Body of a rotation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    overlap_s: int = Field(
        default=DAY_S, ge=0, le=MOST_S, description="seconds for which the old key is accepted still"
    )


class Key(BaseModel):
    """One key, without its secret."""

    id: str
    object: Literal["api_key"] = "api_key"
    name: str
    hint: str
    """The first characters of the secret."""
    tenant: str
    role: RoleName
    models: list[str]
    limits: dict[str, int]
    created_at: str
    """ISO 8601, UTC; so are the other times."""
    expires_at: str | None
    revoked_at: str | None
    state: Literal["active", "expired", "revoked"]


class CreatedKey(Key):
    """A key that was just made, with its secret: no other answer has that."""

    secret: str
    warnings: list[str] = Field(default_factory=list)
    """What is probably not meant, such as a model that is not registered."""


class KeyList(BaseModel):
    """One page of keys."""

    object: Literal["list"] = "list"
    data: list[Key]
    has_more: bool
    last_id: str | None
    """`after` of the next page."""
