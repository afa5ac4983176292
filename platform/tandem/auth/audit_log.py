"""Audit log of a registry's database: entries are appended in batches, and read in pages, newest first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import select

from tandem.db.audit import Change, record_change
from tandem.db.schema import AuditRow
from tandem.registry.connection import RegistryConnection

T = TypeVar("T")
Entries = list["AuditEntry"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditEntry:
    """One entry."""

    id: int
    at: datetime
    by: str
    action: str
    target: str
    address: str | None
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """The entry for lists."""
        return {
            "id": self.id,
            "object": "audit_entry",
            "at": self.at.isoformat(),
            "by": self.by,
            "action": self.action,
            "target": self.target,
            "address": self.address,
            "before": None if self.before is None else dict(self.before),
            "after": None if self.after is None else dict(self.after),
        }


class AuditLog(RegistryConnection):
    """The log; nothing here changes or removes an entry."""

    def append(self, changes: Sequence[Change]) -> None:
        """Add entries in one transaction. It does not raise the registry's revision: no copy of anything is stale after it."""
        with self._adding() as session:
            for change in changes:
                record_change(session, change)

    def page(
        self,
        *,
        after: int | None = None,
        limit: int = 100,
        since: datetime | None = None,
        action: str | None = None,
        by: str | None = None,
    ) -> Entries:
        """At most `limit` entries, newest first, that are older than the entry `after`.

        `since`: only those at or after that time. `action`: only of that action, or of a group such as `keys`. `by`: only of that
        key or user.
        """
        query = select(AuditRow).order_by(AuditRow.id.desc()).limit(limit)
        if after is not None:
            query = query.where(AuditRow.id < after)
        if since is not None:
            query = query.where(AuditRow.at >= since)
        if action is not None:
            group = AuditRow.action.startswith(f"{action}.", autoescape=True)
            query = query.where((AuditRow.action == action) | group)
        if by is not None:
            query = query.where(AuditRow.by == by)
        with self._reading() as session:
            return [
                AuditEntry(
                    id=row.id,
                    at=row.at,
                    by=row.by,
                    action=row.action,
                    target=row.target,
                    address=row.address,
                    before=row.before,
                    after=row.after,
                )
                for row in session.scalars(query)
            ]


def audited(
    work: Callable[[], T],
    *,
    state: Callable[[], dict[str, Any]],
    record: Callable[[Change], None],
    action: str,
    target: str,
    by: str,
    address: str | None = None,
    entry_fields: Callable[[T], dict[str, Any]] = lambda _: {},
) -> T:
    """Do `work` and record it with the state before and after, unless it raises. `entry_fields`: more of `after`."""
    before = state()
    result = work()
    after = state() | entry_fields(result)
    record(Change(by=by, action=action, target=target, address=address, before=before, after=after))
    return result
