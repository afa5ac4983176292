"""Wire models of the routes for usage and tenants."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from tandem.api.keys import KeyLimits


class UsagePage(BaseModel):
    """Sums of requests and tokens."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    """One object for each combination of the columns: these, and requests, prompt_tokens, completion_tokens and
    estimated_requests."""
    has_more: bool


class Tenant(BaseModel):
    """A tenant with the limits that its keys share."""

    tenant: str
    object: Literal["tenant"] = "tenant"
    limits: KeyLimits


class ListedTenant(Tenant):
    """A tenant in the list."""

    keys: int
    """Number of its active keys."""


class TenantList(BaseModel):
    """The tenants that have limits or active keys."""

    object: Literal["list"] = "list"
    data: list[ListedTenant]
