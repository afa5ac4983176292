"""Backups of a database, restored into one of the same kind and of another; PostgreSQL is a real one."""

from __future__ import annotations

import gzip
import json
import stat
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from postgresql import Server
from small_folders import small_adapter, small_model
from sqlalchemy import select

from tandem.auth import KeyStore, Limits, Role
from tandem.auth.audit_log import AuditLog
from tandem.db.backup import backup, restore
from tandem.db.database import open_database
from tandem.db.schema import Base
from tandem.errors import RegistryError
from tandem.registry import Registry


def rows(url: str) -> dict[str, list[Any]]:
    """Everything in a database, by table."""
    engine = open_database(url)
    with engine.connect() as connection:
        found = {
            table.name: sorted((tuple(row) for row in connection.execute(select(table))), key=repr)
            for table in Base.metadata.sorted_tables
        }
    engine.dispose()
    return found


@pytest.fixture
def url(tmp_path: Path) -> str:
    """An SQLite registry with a base, adapters, keys, limits and an audit log."""
    registry = Registry(f"sqlite:///{tmp_path}/first.db")
    base = small_model(tmp_path / "base")
    registry.register_model("base", base)
    for seed in range(2):
        registry.register_adapter("red", small_adapter(tmp_path / f"red{seed}", str(seed)), base="base")
    registry.roll_back("red")
    registry.pin("red")
    keys = KeyStore.at(registry.address)
    keys.create("ann", tenant="lab", role=Role.ADMIN, models=["base"], expires_in=timedelta(days=3), by="test")
    keys.limit_tenant("lab", Limits(tokens_per_day=5), by="test")
    return registry.url


def test_a_backup_goes_from_sqlite_to_postgresql_and_back_with_its_identity(
    url: str, tmp_path: Path, postgresql_server: Server
) -> None:
    first, second = tmp_path / "first.gz", tmp_path / "second.gz"
    done = backup(url, first)
    assert done.rows > 10 and stat.S_IMODE(first.stat().st_mode) == 0o600
    shared = postgresql_server.create("restored")
    assert restore(shared, first).identity == done.identity == Registry(url).identity
    assert rows(shared) == rows(url)
    backup(shared, second)
    again = f"sqlite:///{tmp_path}/again.db"
    restore(again, second)
    assert rows(again) == rows(url)


def test_a_restored_database_is_written_on(url: str, tmp_path: Path, postgresql_server: Server) -> None:
    backup(url, tmp_path / "b.gz")
    for target in (postgresql_server.create("written"), f"sqlite:///{tmp_path}/written.db"):
        restore(target, tmp_path / "b.gz")
        registry = Registry(target)
        # Numbers that the database gives out go on.
        assert registry.promote("red@2").id == "red@2" and registry.resolve("red").id == "red@2"
        before = AuditLog.at(registry.address).page()
        KeyStore.at(registry.address).create("bob", by="test")
        assert len(AuditLog.at(registry.address).page()) == len(before) + 1


def test_a_database_that_is_in_use_is_not_overwritten(url: str, tmp_path: Path) -> None:
    backup(url, tmp_path / "b.gz")
    before = rows(url)
    with pytest.raises(RegistryError, match="has a registry already"):
        restore(url, tmp_path / "b.gz")
    assert rows(url) == before
    with pytest.raises(RegistryError, match="choose another name"):
        backup(url, tmp_path / "b.gz")


def test_a_file_that_is_not_whole_changes_nothing(url: str, tmp_path: Path) -> None:
    whole = tmp_path / "b.gz"
    backup(url, whole)
    lines = gzip.decompress(whole.read_bytes()).splitlines(keepends=True)
    other = json.dumps(json.loads(lines[0]) | {"revision": "9999"}).encode() + b"\n"
    damaged = {
        "cut.gz": (whole.read_bytes()[:-40], "cannot be read"),
        "short.gz": (gzip.compress(b"".join(lines[:-1])), "not whole"),
        "text.gz": (b"hello", "cannot be read"),
        "json.gz": (gzip.compress(b'{"a": 1}\n'), "is no backup"),
        "newer.gz": (gzip.compress(b"".join([other, *lines[1:]])), "schema 9999"),
    }
    target = f"sqlite:///{tmp_path}/target.db"
    for name, (content, said) in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RegistryError, match=said):
            restore(target, tmp_path / name)
    assert not (tmp_path / "target.db").exists()
    with pytest.raises(RegistryError, match="There is no file"):
        restore(target, tmp_path / "none.gz")


def test_there_is_nothing_to_back_up_without_a_registry(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="There is no registry"):
        backup(f"sqlite:///{tmp_path}/none.db", tmp_path / "b.gz")
    assert not (tmp_path / "b.gz").exists() and not (tmp_path / "none.db").exists()
