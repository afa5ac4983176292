"""Leadership by lease: one process leads in a role, and writes of those that led before are refused.

A leader renews its lease well before it ends. One that stalls longer is replaced; the term then grows, so that what it writes
when it wakes up, under its old term, changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from tandem.db.inserts import insert_into
from tandem.db.schema import LeaderRow
from tandem.errors import LeaseLostError
from tandem.jobs.work.connection import WorkConnection

DISPATCHER = "dispatcher"
"""Role of the process that starts jobs."""


class Term(NamedTuple):
    """The right to lead, from one change of the leader to the next."""

    role: str
    owner: str
    number: int


class Leadership(WorkConnection):
    """The leaders of all roles."""

    def acquire(self, role: str, owner: str, lease_s: float) -> Term | None:
        """Lead, or go on leading, for `lease_s` seconds from now; None while another process leads."""
        with self._transaction() as (session, now):
            until = now + timedelta(seconds=lease_s)
            row = session.get(LeaderRow, role, with_for_update=True)
            if row is None:
                if not _insert_first(session, {"role": role, "owner": owner, "term": 1, "until": until}):
                    return None
                return Term(role, owner, 1)
            if row.owner != owner:
                if row.until > now:
                    return None
                row.owner, row.term = owner, row.term + 1
            row.until = until
            return Term(role, owner, row.term)

    def resign(self, term: Term) -> None:
        """End a lease at once, so that another process need not wait for its end."""
        with self._transaction() as (session, now):
            row = session.get(LeaderRow, term.role, with_for_update=True)
            if row is not None and (row.owner, row.term) == (term.owner, term.number):
                row.owner, row.until = "", now


def check_term(session: Session, term: Term) -> None:
    """LeaseLostError unless the term is the newest. It stays so until the transaction ends."""
    query = select(LeaderRow.owner, LeaderRow.term).where(LeaderRow.role == term.role).with_for_update(read=True)
    newest = session.execute(query).one_or_none()
    if newest is None or tuple(newest) != (term.owner, term.number):
        holder = "nobody" if newest is None or not newest.owner else f"{newest.owner} (term {newest.term})"
        raise LeaseLostError(
            f"{term.owner} led as {term.role} in term {term.number}; now {holder} does. Nothing was changed; acquire it anew."
        )


def _insert_first(session: Session, values: Mapping[str, Any]) -> bool:
    """Whether this process, and not one that tried at the same time, has made the row."""
    statement = insert_into(session, LeaderRow).values(**values).on_conflict_do_nothing()
    return session.execute(statement.returning(LeaderRow.role)).first() is not None
