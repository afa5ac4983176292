"""Audit log: who changed what, from where, before and after. An entry is made in the transaction of its change, and stays."""

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
    """A key's id, or `user@host` of a command."""
    action: str
    """`keys.create`, `keys.rotate` or `keys.revoke`."""
    target: str
    address: str | None = None
    """Where the change came from; None for commands."""
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None


def record_change(session: Session, change: Change) -> None:
    """Add an entry to the transaction of a session."""
    session.add(
        AuditRow(
            at=datetime.now(UTC),
            by=change.by[:120],
            action=change.action,
            target=change.target[:120],
            address=change.address,
            before=None if change.before is None else dict(change.before),
            after=None if change.after is None else dict(change.after),
        )
    )
