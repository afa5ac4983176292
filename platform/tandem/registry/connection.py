"""Connection to the registry's database: settings and addresses, identity, transactions, and the clock of changes."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Self

from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from tandem.db.database import (
    IMPATIENT,
    PATIENT,
    Timeouts,
    break_connections,
    database_errors,
    open_database,
    redacted_url,
)
from tandem.db.schema import ClockRow, IdentityRow
from tandem.errors import RegistryError
from tandem.private import check_home
from tandem.registry.records import RegistryAddress
from tandem.settings import settings


class RegistryConnection:
    """The database of one registry, opened at its first use or at once."""

    def __init__(self, url: str, *, identity: str | None = None, timeouts: Timeouts = PATIENT) -> None:
        """The registry in the database at an SQLAlchemy URL.

        Without `identity` it is opened now: an SQLite database is made or migrated if need be, a PostgreSQL one is not (`tandem
        db upgrade`). With `identity` it is opened at its first use, nothing is ever made, and the registry that is there must be
        that one. RegistryError if it cannot be opened, or is another one.
        """
        self.url = url
        self._timeouts = timeouts
        self._open_lock = threading.Lock()
        self._open_engine: Engine | None = None
        self._identity = identity
        if identity is None:
            self._open_engine = open_database(url, timeouts=timeouts)
            self._identity = _identity_of(self._open_engine)

    @property
    def identity(self) -> str:
        """Random id of this registry, made with its database."""
        assert self._identity is not None
        return self._identity

    @property
    def _engine(self) -> Engine:
        with self._open_lock:
            if self._open_engine is None:
                engine = open_database(self.url, create=False, timeouts=self._timeouts)
                if (identity := _identity_of(engine)) != self._identity:
                    engine.dispose()
                    raise RegistryError(
                        f"The registry {redacted_url(engine.url)} on {socket.gethostname()} is another ({identity[:8]}) than the "
                        f"one expected ({self.identity[:8]}). All nodes must use the same one: set TANDEM_DATABASE_URL to a "
                        "PostgreSQL database."
                    )
                self._open_engine = engine
            return self._open_engine

    @classmethod
    def open(cls) -> Self:
        """The registry that the settings name; the one with the identity TANDEM_REGISTRY_ID where that is set.

        Creates TANDEM_HOME unless an identity is set; UnsafePathError if every user can write there.
        """
        config = settings()
        if config.registry_id is None:
            check_home(config.root)
        return cls(config.registry_url, identity=config.registry_id)

    @property
    def address(self) -> RegistryAddress:
        """URL and identity, by which a process on another node opens this registry."""
        return RegistryAddress(url=self.url, identity=self.identity)

    @classmethod
    def at(cls, address: RegistryAddress, timeouts: Timeouts = PATIENT) -> Self:
        """The registry of an address, on any node; opened, and compared with the address, at its first use."""
        return cls(address.url, identity=address.identity, timeouts=timeouts)

    def impatient(self) -> Self:
        """The same registry on connections of its own, with short time-outs: for reads that requests wait for."""
        return self.at(self.address, IMPATIENT)

    def __reduce__(self) -> tuple[Callable[[RegistryAddress], Self], tuple[RegistryAddress]]:
        """Pickles as its address, so that it can be handed to a Ray actor."""
        return type(self).at, (self.address,)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        if self._open_engine is not None:
            self._open_engine.dispose()

    def abort(self) -> None:
        """End the connections at once, with an error for threads that wait on them; the next call opens new ones."""
        if self._open_engine is not None:
            break_connections(self._open_engine)

    def revision(self) -> int:
        """A number that grows with each change: poll it to know when a copy is stale. One small query."""
        with database_errors(self._engine.url), self._engine.connect() as connection:
            return connection.execute(select(ClockRow.revision)).scalar_one()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Session]:
        with database_errors(self._engine.url), Session(self._engine) as session:
            yield session

    @contextlib.contextmanager
    def _adding(self) -> Iterator[Session]:
        """A transaction that leaves the clock alone: no copy of anything is stale after it."""
        with database_errors(self._engine.url), Session(self._engine) as session, session.begin():
            yield session

    @contextlib.contextmanager
    def _writing(self) -> Iterator[tuple[Session, int]]:
        """A transaction that starts by bumping the clock.

        It then holds the write lock on SQLite and the row's lock elsewhere, so what it reads next is the latest, and
        stays so until it commits.
        """
        with database_errors(self._engine.url), Session(self._engine, expire_on_commit=False) as session:
            with session.begin():
                session.execute(update(ClockRow).values(revision=ClockRow.revision + 1))
                yield session, session.execute(select(ClockRow.revision)).scalar_one()


def _identity_of(engine: Engine) -> str:
    with database_errors(engine.url), Session(engine) as session:
        return session.execute(select(IdentityRow.id)).scalar_one()
