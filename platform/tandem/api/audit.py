"""Wire models of the audit log."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class AuditEntry(BaseModel):
    """One entry: who did what, when, from where, and what was before and after."""

    id: int
    object: Literal["audit_entry"] = "audit_entry"
    at: str
    """ISO 8601, UTC."""
    by: str
    """A key's id, `user@host` of a command, or empty for an unknown client."""
    action: str
    target: str
    address: str | None
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class AuditPage(BaseModel):
    """One page of the log, newest first."""

    object: Literal["list"] = "list"
    data: list[AuditEntry]
    has_more: bool
    last_id: int | None
    """`after` of the next page."""
