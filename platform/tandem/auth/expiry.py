"""A later expiry for a key whose owner goes on longer than planned."""

from __future__ import annotations

from datetime import timedelta

from tandem.auth.keys import KeyStore
from tandem.db.audit import Change, record_change
from tandem.db.schema import ApiKeyRow
from tandem.errors import UnknownKeyError


def postpone(store: KeyStore, key_id: str, added: timedelta, *, by: str) -> None:
    """Let a key expire later by `added`; one that is revoked or never expires stays. UnknownKeyError if there is none."""
    with store._writing() as (session, revision):
        row = session.get(ApiKeyRow, key_id)
        if row is None:
            raise UnknownKeyError(f"There is no key {key_id[:80]!r}.")
        if row.revoked_at is not None or row.expires_at is None:
            return
        before = row.expires_at
        row.expires_at, row.revision = before + added, revision
        change = Change(
            by=by,
            action="keys.postpone",
            target=key_id,
            before={"expires_at": before.isoformat()},
            after={"expires_at": row.expires_at.isoformat()},
        )
        record_change(session, change)
