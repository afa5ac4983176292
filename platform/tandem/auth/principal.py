"""The principal of a request: tenant, role, allowed models and limits that its API key gives it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, Self

from tandem.errors import ConfigError, did_you_mean


class Role(StrEnum):
    """Rights of a key. Each role includes the rights of those after it."""

    ADMIN = "admin"
    """Manage keys and adapters, of every tenant."""
    TRAINER = "trainer"
    """Use models; create fine-tuning jobs, and change jobs of its tenant."""
    USER = "user"
    """Use models."""

    def includes(self, other: Role) -> bool:
        """Whether this role may do what `other` may."""
        order = list(Role)
        return order.index(self) <= order.index(other)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of a key or a tenant; None: unlimited, but for `highest_priority`."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Tokens of prompts and answers together."""
    concurrent_requests: int | None = None
    tokens_per_day: int | None = None
    """Tokens of prompts and answers together, from midnight to midnight UTC."""
    highest_priority: int | None = None
    """The most urgent `priority` that a request may have (vLLM's convention: lower numbers first); others are lowered to it. Of a
    key's and its tenant's the stricter one counts; None: that of the other, 0 where neither has one."""

    @property
    def counts_anything(self) -> bool:
        """Whether requests or tokens have to be counted."""
        limits = (self.requests_per_minute, self.tokens_per_minute, self.concurrent_requests, self.tokens_per_day)
        return any(limit is not None for limit in limits)

    def __post_init__(self) -> None:
        for limit_field in fields(self):
            value = getattr(self, limit_field.name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{limit_field.name} is {value!r}; it must be a whole number.")
            if value < 0 and limit_field.name != "highest_priority":
                raise ConfigError(f"{limit_field.name} is {value}; it must be at least 0.")

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The limits in a JSON object; ConfigError for unknown keys."""
        names = [limit.name for limit in fields(cls)]
        for key in value:
            if key not in names:
                raise ConfigError(f"There is no limit {key!r}.{did_you_mean(key, names)} Limits: {', '.join(names)}.")
        return cls(**value)

    def to_json(self) -> dict[str, int]:
        """The limits that are set."""
        return {key: value for key, value in asdict(self).items() if value is not None}


UNLIMITED = Limits()
NOTHING = Limits(requests_per_minute=0)
"""The limits of a tenant that may have no request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Principal:
    """The caller of a request."""

    key_id: str
    tenant: str
    role: Role
    models: tuple[str, ...] = ()
    """Names of models and adapters that it may use; empty: all that its tenant sees."""
    limits: Limits = field(default_factory=Limits)
    origin: str = ""
    """The first key of the chain of rotations that led to this one; empty: it is the key itself."""

    @property
    def counted_as(self) -> str:
        """The key by which requests and tokens are counted for its limits: a rotation does not start them anew."""
        return self.origin or self.key_id

    @property
    def sees_all(self) -> bool:
        """Whether names of all tenants exist for it: for admins and without keys."""
        return not self.tenant or self.role is Role.ADMIN

    def sees(self, tenant: str | None) -> bool:
        """Whether names of a tenant exist for it: its own, and shared ones (None)."""
        return tenant is None or tenant == self.tenant or self.sees_all

    def may_use(self, *names: str) -> bool:
        """Whether a model with these names (its alias, its id) is allowed."""
        return not self.models or any(name in self.models for name in names)


ANONYMOUS = Principal(key_id="", tenant="", role=Role.USER)
"""The principal of every request to an app without keys, which listens on loopback only."""
