"""A gateway's copy of the keys: every change is seen, and none of it asks the database while a request waits."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NoReturn

import pytest
from sqlalchemy import text

from tandem.auth import KeyStore, key_table, keys
from tandem.auth.key_table import KeyTable
from tandem.auth.keys import ChangedKey
from tandem.auth.principal import Limits
from tandem.errors import RegistryUnreachableError

DATABASE_AWAY = "the database is away"


class Store(KeyStore):
    """Keys in a database that can be taken away."""

    away = False

    def revision(self) -> int:
        if self.away:
            raise RegistryUnreachableError(DATABASE_AWAY)
        return super().revision()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"sqlite:///{tmp_path}/tandem.db")


@pytest.fixture
async def table(store: Store) -> AsyncIterator[KeyTable]:
    table = KeyTable(store)
    await table.start()
    yield table
    await table.stop()


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_new_and_revoked_keys_are_seen_within_five_seconds(store: Store, table: KeyTable) -> None:
    assert table.loaded and not table.has_keys
    new = store.create("laptop", tenant="lab", by="ann")
    await until(lambda: table.authenticate(new.secret) is not None)
    found = table.authenticate(new.secret)
    assert found is not None and found.tenant == "lab" and found.key_id == new.key.id
    assert table.authenticate(new.secret + "x") is None and table.authenticate("") is None
    store.revoke(new.key.id, by="ann")
    await until(lambda: table.authenticate(new.secret) is None)
    # There were keys: an app does not become open to everybody when the last one has ended.
    assert table.has_keys


async def test_a_key_expires_without_a_change_in_the_database(store: Store) -> None:
    now = datetime.now(UTC)
    table = KeyTable(store, lambda: now)
    new = store.create("brief", expires_in=timedelta(minutes=5), by="ann")
    await table.start()
    try:
        assert table.authenticate(new.secret) is not None
        now += timedelta(minutes=6)
        assert table.authenticate(new.secret) is None
        # Whoever has the whole secret is told why it is not accepted.
        assert table.expired_at(new.secret) == new.key.expires_at and table.expired_at(new.secret[:-1]) is None
    finally:
        await table.stop()


async def test_known_keys_stay_valid_while_the_database_is_away(
    store: Store, table: KeyTable, caplog: pytest.LogCaptureFixture
) -> None:
    new = store.create("laptop", by="ann")
    await until(lambda: table.authenticate(new.secret) is not None)
    store.away = True
    await until(lambda: DATABASE_AWAY in caplog.text)
    assert table.authenticate(new.secret) is not None
    store.away = False
    store.revoke("laptop", by="ann")
    await until(lambda: table.authenticate(new.secret) is None)


async def test_a_table_that_could_not_be_read_yet_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_table, "START_S", 0.2)
    store = Store(f"sqlite:///{tmp_path}/tandem.db")
    new = store.create("laptop", by="ann")
    store.away = True
    table = KeyTable(store)
    await table.start()
    try:
        assert not table.loaded and table.authenticate(new.secret) is None
        store.away = False
        await until(lambda: table.loaded)
        assert table.authenticate(new.secret) is not None
    finally:
        await table.stop()


@pytest.mark.parametrize("column", ["role = 'owner'", "limits = '{\"unheard_of\": 1}'", "limits = '3'"])
async def test_a_row_that_this_version_cannot_read_is_refused_and_stops_no_other_change(
    store: Store, table: KeyTable, column: str
) -> None:
    strange, usual = store.create("strange", by="ann"), store.create("usual", by="ann")
    with store._engine.begin() as connection:
        connection.execute(text(f"UPDATE api_keys SET {column} WHERE id = '{strange.key.id}'"))
    await until(lambda: table.authenticate(usual.secret) is not None)
    assert table.authenticate(strange.secret) is None
    store.revoke(usual.key.id, by="ann")
    await until(lambda: table.authenticate(usual.secret) is None)


async def test_keys_come_in_pages(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "PAGE", 2)
    made = [store.create(f"key-{number}", by="ann") for number in range(5)]
    table = KeyTable(store)
    await table.start()
    try:
        assert all(table.authenticate(each.secret) for each in made)
    finally:
        await table.stop()


async def test_after_a_restored_backup_only_its_keys_are_accepted(
    store: Store, table: KeyTable, tmp_path: Path
) -> None:
    kept = store.create("kept", by="ann")
    backup = sqlite3.connect(tmp_path / "backup.db")
    with sqlite3.connect(tmp_path / "tandem.db") as source:
        source.backup(backup)
    lost = store.create("lost", by="ann")
    await until(lambda: table.authenticate(lost.secret) is not None)
    with sqlite3.connect(tmp_path / "tandem.db") as target:
        backup.backup(target)
    await until(lambda: table.authenticate(lost.secret) is None)
    assert table.authenticate(kept.secret) is not None


async def test_a_tenant_that_cannot_be_read_is_refused_by_itself_and_stops_no_gateway(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    new = store.create("laptop", tenant="lab", by="ann")
    for tenant in ("lab", "shop"):
        store.limit_tenant(tenant, Limits(concurrent_requests=3), by="ann")
    with store._writing() as (session, _):
        session.execute(text("UPDATE tenants SET limits = :limits WHERE name = 'lab'"), {"limits": '{"of_2031": 1}'})
    table = KeyTable(store)
    await table.start()
    try:
        assert table.loaded and table.authenticate(new.secret) is not None
        assert table.tenant_limits("lab") == Limits(requests_per_minute=0)
        assert table.tenant_limits("shop") == Limits(concurrent_requests=3)
        assert "Requests of the tenant lab are refused" in caplog.text and "of_2031" in caplog.text
    finally:
        await table.stop()


async def test_a_change_of_the_registry_that_is_none_of_keys_looks_at_no_key(
    store: Store, table: KeyTable, caplog: pytest.LogCaptureFixture
) -> None:
    new = store.create("laptop", tenant="lab", by="ann")
    await until(lambda: table.authenticate(new.secret) is not None)

    class Looked(dict[str, ChangedKey]):
        """Keys that nobody may go through."""

        def values(self) -> NoReturn:
            raise AssertionError("all keys were looked at")

        __iter__ = items = values  # type: ignore[assignment]

    table._keys = Looked(table._keys)
    with store._writing() as (_, revision):
        pass
    await until(lambda: table._revision == revision)
    assert "could not be read" not in caplog.text


async def test_it_is_known_whether_any_key_has_a_limit_by_the_day(store: Store, table: KeyTable) -> None:
    new = store.create("laptop", tenant="lab", limits=Limits(tokens_per_day=5), by="ann")
    await until(lambda: table.budgets.keys == frozenset({new.key.id}))
    store.revoke(new.key.id, by="ann")
    await until(lambda: not table.budgets.keys)
