"""Audit log: changes, with their author, address and state before and after, and refused credentials. Append-only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy.orm import Session

from tandem.db.schema import AuditRow


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One entry."""

    by: str
    """A key's id, or `user@host` of a command; empty: an unknown client."""
    action: str
    """Such as `keys.create`, `adapters.promote` or `credentials.refused`."""
    target: str
    address: str | None = None
    """IP address of the client; None for commands."""
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None
    at: datetime | None = None
    """Time of the change; None: now."""


def record_change(session: Session, change: Change) -> None:
    """Add an entry to the transaction of a session."""
    session.add(
        AuditRow(
            at=change.at or datetime.now(UTC),
            by=change.by[:120],
            action=change.action[:64],
            target=change.target[:120],
            address=None if change.address is None else change.address[:64],
            before=None if change.before is None else dict(change.before),
            after=None if change.after is None else dict(change.after),
        )
    )
