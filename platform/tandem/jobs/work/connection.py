"""Transactions on durable work: they see the latest rows, and hold what they read until they commit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime
from typing import Self

from sqlalchemy.orm import Session

from tandem.db.database import IMMEDIATE, PATIENT, Timeouts, database_errors
from tandem.jobs.work.clock import Clock, DatabaseClock
from tandem.registry.connection import RegistryConnection

DATABASE_CLOCK = DatabaseClock()


class WorkConnection(RegistryConnection):
    """The registry's database, for durable work. Does not change the registry's revision."""

    def __init__(
        self, url: str, *, identity: str | None = None, timeouts: Timeouts = PATIENT, clock: Clock = DATABASE_CLOCK
    ) -> None:
        """See `RegistryConnection`."""
        super().__init__(url, identity=identity, timeouts=timeouts)
        self.clock = clock

    def with_clock(self, clock: Clock) -> Self:
        """The same database by another clock, on connections of its own."""
        return type(self)(self.url, identity=self.identity, timeouts=self._timeouts, clock=clock)

    def now(self) -> datetime:
        """The time by the clock of leases and deadlines."""
        with self._reading() as session:
            return self.clock.now(session.connection())

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[tuple[Session, datetime]]:
        """A transaction that writes, and the time.

        SQLite's takes the write lock at its begin: one that reads first could else not write after another has written. On
        PostgreSQL rows are locked when they are read (`with_for_update`).
        """
        engine = self._engine.execution_options(**IMMEDIATE)
        with database_errors(engine.url), Session(engine, expire_on_commit=False) as session, session.begin():
            yield session, self.clock.now(session.connection())
