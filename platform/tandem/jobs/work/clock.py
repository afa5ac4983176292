"""Clock of leases, delays and deadlines: the database's own.

Gateways, dispatchers and workers on several nodes compare the same leases, and their clocks differ; the database has one clock
for all of them. SQLite's clock is this machine's, and only processes of this machine use the file. Tests inject a `ManualClock`.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Protocol

from sqlalchemy import Connection, func, select


class Clock(Protocol):
    """Source of the time in a transaction."""

    def now(self, connection: Connection) -> datetime:
        """The time, in UTC."""


class DatabaseClock:
    """The clock of the database's server."""

    def now(self, connection: Connection) -> datetime:
        """See `Clock`. The time of the call, not of the transaction's begin: it may have waited for a lock since."""
        if connection.dialect.name != "postgresql":
            return datetime.now(UTC)
        time: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
        return time.astimezone(UTC)


class ManualClock:
    """A clock that a test advances; the same instance has to be given to all who shall agree."""

    def __init__(self, start: datetime) -> None:
        self._now = start

    def now(self, connection: Connection | None = None) -> datetime:
        """See `Clock`."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self._now += timedelta(seconds=seconds)
