"""Stores of durable work on SQLite and on a real PostgreSQL, with a clock that tests advance."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from postgresql import Server

from tandem.db.database import open_database
from tandem.jobs.work.clock import ManualClock
from tandem.jobs.work.leader import Leadership
from tandem.jobs.work.queue import ItemQueue
from tandem.jobs.work.store import JobStore

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with the tables, for copies: migrations take longer than most tests."""
    path = tmp_path_factory.mktemp("template") / "tandem.db"
    engine = open_database(f"sqlite:///{path}", create=True)
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    engine.dispose()
    return path


@pytest.fixture(scope="session")
def postgresql_template(postgresql_server: Server) -> str:
    """The name of a PostgreSQL database with the tables, for copies."""
    name = f"template-{uuid.uuid4().hex}"
    open_database(postgresql_server.create(name), create=True).dispose()
    return name


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database with the tables, of each kind."""
    if request.param == "postgresql":
        server: Server = request.getfixturevalue("postgresql_server")
        return server.create(uuid.uuid4().hex, template=request.getfixturevalue("postgresql_template"))
    shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "tandem.db")
    return f"sqlite:///{tmp_path}/tandem.db"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOON)


@pytest.fixture
def store(url: str, clock: ManualClock) -> Iterator[JobStore]:
    with JobStore(url, clock=clock) as opened:
        yield opened


@pytest.fixture
def queue(url: str, clock: ManualClock) -> Iterator[ItemQueue]:
    with ItemQueue(url, clock=clock) as opened:
        yield opened


@pytest.fixture
def leadership(url: str, clock: ManualClock) -> Iterator[Leadership]:
    with Leadership(url, clock=clock) as opened:
        yield opened
