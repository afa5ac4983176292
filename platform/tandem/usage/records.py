"""Usage records: labels of a request, hourly keys and counts. Plain data."""

from __future__ import annotations

import functools
import json
from datetime import UTC, datetime
from typing import NamedTuple, Self

from pydantic_core import from_json


class UsageLabels(NamedTuple):
    """Key, tenant, model, adapter and route that a request's usage is added to. Gateways send it to replicas in a header."""

    key_id: str
    tenant: str
    model: str
    """Id of the base model."""
    adapter: str
    """Id of the adapter; empty: none."""
    route: str

    def to_header(self) -> str:
        """An ASCII header value."""
        return _header(self)

    @classmethod
    def from_header(cls, value: bytes) -> Self | None:
        """The labels in a header; None for anything else."""
        try:
            fields = from_json(value)
            return cls(*map(str, fields)) if isinstance(fields, list) else None
        except (ValueError, TypeError):
            return None


@functools.lru_cache(maxsize=4096)
def _header(labels: UsageLabels) -> str:
    return json.dumps(labels)


class UsageKey(NamedTuple):
    """One row of usage."""

    hour: datetime
    labels: UsageLabels

    @classmethod
    def at(cls, labels: UsageLabels, seconds: float) -> Self:
        """The row of a request that ended at a time, in seconds since 1970."""
        return cls(datetime.fromtimestamp(seconds - seconds % 3600, UTC), labels)


class UsageCounts(NamedTuple):
    """Counts of some requests."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated_requests: int = 0
    """Requests whose tokens are estimated, because the engine was killed before it reported them."""

    def plus(self, other: UsageCounts) -> UsageCounts:
        """The sum."""
        return UsageCounts(*(a + b for a, b in zip(self, other, strict=True)))
