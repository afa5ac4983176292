"""Audit log in the database: appended without a new revision, read in pages, newest first, by time, action and key."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from postgresql import Server

from tandem.auth import KeyStore
from tandem.auth.audit_log import AuditLog
from tandem.db.audit import Change
from tandem.db.database import open_database


@pytest.fixture(params=["sqlite", "postgresql"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> AuditLog:
    url = f"sqlite:///{tmp_path}/tandem.db"
    if request.param == "postgresql":
        server: Server = request.getfixturevalue("postgresql_server")
        url = server.create(uuid.uuid4().hex)
    open_database(url, create=True).dispose()
    return AuditLog(url)


def test_entries_come_back_whole_and_do_not_raise_the_revision(log: AuditLog) -> None:
    before = log.revision()
    at = datetime(2026, 1, 2, tzinfo=UTC)
    log.append(
        [Change(by="key_1", action="a.b", target="x", address="10.0.0.1", before={"a": 1}, after={"a": 2}, at=at)]
    )
    (entry,) = log.page()
    assert (entry.by, entry.action, entry.target, entry.address) == ("key_1", "a.b", "x", "10.0.0.1")
    assert (entry.before, entry.after, entry.at) == ({"a": 1}, {"a": 2}, at)
    assert log.revision() == before


def test_a_batch_with_values_of_any_length_is_written(log: AuditLog) -> None:
    log.append([Change(by="b" * 500, action="a" * 500, target="t" * 500, address="9" * 500)])
    (entry,) = log.page()
    assert [len(each or "") for each in (entry.by, entry.action, entry.target, entry.address)] == [120, 64, 120, 64]


def test_pages_and_filters(log: AuditLog) -> None:
    KeyStore(log.url).create("ann", by="ann@host")
    now = datetime.now(UTC)
    log.append(
        [
            Change(by="key_1", action="adapters.pin", target="red"),
            Change(by="", action="credentials.refused", target="GET /", at=now - timedelta(days=2)),
            Change(by="key_1", action="adaptersx", target="red"),
        ]
    )
    first = log.page(limit=2)
    rest = log.page(limit=10, after=first[-1].id)
    actions = [entry.action for entry in (*first, *rest)]
    assert actions == ["adaptersx", "credentials.refused", "adapters.pin", "keys.create"]
    assert [entry.action for entry in log.page(action="adapters")] == ["adapters.pin"]
    assert [entry.action for entry in log.page(action="adapters.pin")] == ["adapters.pin"]
    assert log.page(action="adapters_") == [] and log.page(action="%") == []
    assert {entry.action for entry in log.page(by="key_1")} == {"adapters.pin", "adaptersx"}
    assert "credentials.refused" not in {entry.action for entry in log.page(since=now - timedelta(days=1))}
