"""Database connections (SQLite or PostgreSQL): connection rules, and schema migration under a lock."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, select, text
from sqlalchemy.exc import (
    ArgumentError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import StaticPool

from tandem.db.schema import REVISION, IdentityRow
from tandem.errors import RegistryError, RegistryUnreachableError, StorageError, sentence
from tandem.private import make_private_folder
from tandem.storage import disk_errors

UNAVAILABLE_ERRORS = (OperationalError, InterfaceError, PoolTimeoutError)
"""Exceptions of drivers and of SQLAlchemy's pool for an unavailable database, not for a wrong statement."""
ADVISORY_LOCK = 7_263_001
"""PostgreSQL's advisory lock that migrations hold."""
POSTGRESQL = "postgresql+psycopg"
"""SQLAlchemy's name of psycopg 3; `postgresql://` and `postgres://` mean it too."""
BACKENDS = ("sqlite", "postgresql")
IMMEDIATE = {"sqlite_begin": "BEGIN IMMEDIATE"}
"""Execution options of an engine whose transactions read before they write: SQLite takes the write lock at the begin."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeouts:
    """Time that a database has to answer."""

    connect_s: int
    """To accept a connection, in seconds; PostgreSQL's client library takes 2 at least."""
    statement_ms: int
    """For one statement on PostgreSQL, and for a lock on SQLite, in milliseconds."""
    pool_s: float
    """For one of a process's connections to become free, in seconds."""


PATIENT = Timeouts(connect_s=5, statement_ms=30_000, pool_s=5.0)
"""For commands, jobs and writers."""
IMPATIENT = Timeouts(connect_s=2, statement_ms=2_000, pool_s=1.0)
"""For reads that a client's request waits for."""
_CONNECTIONS: weakref.WeakKeyDictionary[Engine, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()
"""The driver's connections of each PostgreSQL engine."""


def open_database(url: str, *, create: bool | None = None, timeouts: Timeouts = PATIENT) -> Engine:
    """An engine whose schema is up to date.

    `create` makes the tables, or migrates them, where that is needed; several processes may do so at once. False never does, and
    None only for SQLite: PostgreSQL is shared by many machines, so it is prepared by `tandem db upgrade` alone. RegistryError if
    there is no registry at `url`, or it cannot be opened, or a newer Tandem wrote it.
    """
    parsed = parse_url(url)
    if create is None:
        create = parsed.get_backend_name() == "sqlite"
    path = _file(parsed)
    if not create and path and not path.exists():
        raise RegistryError(_missing_message(parsed))
    engine = connect(url, timeouts)
    with database_errors(engine.url):
        revision = _revision(engine)
        if revision == REVISION:
            return engine
        if not create:
            raise RegistryError(_missing_message(parsed) if revision is None else _outdated_message(parsed, revision))
        with _migration_lock(engine):
            if path:
                # Kept in the file from then on. Switching does not wait for other connections: hence in the lock.
                with engine.connect() as connection:
                    connection.connection.cursor().execute("PRAGMA journal_mode=WAL")
            with engine.begin() as connection:
                _upgrade(connection)
    return engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Upgraded:
    """State of a database after `upgrade`."""

    redacted_url: str
    """The database's URL, password hidden."""
    revision: str
    identity: str


def upgrade(url: str) -> Upgraded:
    """Make or migrate the tables of a database of any kind; RegistryError if it refuses."""
    engine = open_database(url, create=True)
    with database_errors(engine.url), engine.connect() as connection:
        identity = connection.execute(select(IdentityRow.id)).scalar_one()
    engine.dispose()
    return Upgraded(redacted_url=redacted_url(engine.url), revision=REVISION, identity=identity)


def initialise(url: str) -> Upgraded:
    """Make the tables in a database without any; RegistryError where there is a registry already."""
    path = _file(parse_url(url))
    if path is None or path.exists():
        engine = connect(url)
        with database_errors(engine.url):
            revision = _revision(engine)
        engine.dispose()
        if revision is not None:
            raise RegistryError(
                f"{redacted_url(engine.url)} has a registry already, at schema {revision}. `tandem db upgrade` brings it up to "
                "date."
            )
    return upgrade(url)


def parse_url(url: str) -> URL:
    """The parsed URL, PostgreSQL's with its driver; RegistryError for a text that is none."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise _invalid_url_error(url) from error
    if "@" in (parsed.host or ""):
        # The end of a password with an @ in it, taken for a part of the host.
        raise _invalid_url_error(url)
    return parsed.set(drivername=POSTGRESQL) if parsed.drivername in ("postgresql", "postgres") else parsed


def redacted_url(url: URL) -> str:
    """A URL for messages: without passwords, in its user part or in its query."""
    query = {key: "***" if "password" in key.lower() else value for key, value in url.query.items()}
    return url.set(query=query).render_as_string(hide_password=True)


def _invalid_url_error(text: str) -> RegistryError:
    # Any part of it may be a password, but for a scheme.
    scheme = f"{text.partition('://')[0]}://... " if re.match(r"[a-z0-9+]{1,30}://", text) else ""
    return RegistryError(
        f"The database URL {scheme}is not valid. Set TANDEM_DATABASE_URL to "
        "postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with characters such as @ and / in the password as %40 and %2F."
    )


def is_shared(url: str) -> bool:
    """Whether processes on several nodes may use the database at once: SQLite's locks do not reach other machines."""
    return parse_url(url).get_backend_name() != "sqlite"


def connect(url: str, timeouts: Timeouts = PATIENT) -> Engine:
    """An engine with Tandem's connection rules and the schema as it is; RegistryError for a URL that is none."""
    try:
        parsed = parse_url(url)
        if parsed.get_backend_name() not in BACKENDS:
            raise RegistryError(
                f"The registry is kept in SQLite or PostgreSQL, and TANDEM_DATABASE_URL is {parsed.get_backend_name()}://... Set "
                "it to postgresql://USER:PASSWORD@HOST:PORT/DATABASE, or unset it for an SQLite file in TANDEM_HOME."
            )
        options: dict[str, Any] = {"pool_pre_ping": True}
        if parsed.get_backend_name() == "sqlite":
            options = {"connect_args": {"timeout": timeouts.statement_ms / 1000, "check_same_thread": False}}
            if file := _file(parsed):
                with disk_errors("creating the registry", file):
                    make_private_folder(file.parent)
                    _create_private(file)
            else:
                options["poolclass"] = StaticPool  # one connection: each new one would be another empty database
        elif parsed.drivername == POSTGRESQL:
            options |= {"pool_size": 2, "max_overflow": 3, "pool_timeout": timeouts.pool_s, "pool_recycle": 1800}
            # Options in the URL (sslmode, connect_timeout, options, ...) override these.
            options["connect_args"] = {
                "connect_timeout": timeouts.connect_s,
                "options": f"-c statement_timeout={timeouts.statement_ms}",
                "application_name": "tandem",
                "keepalives_idle": 30,
                "keepalives_interval": 10,
                "keepalives_count": 3,
                "tcp_user_timeout": timeouts.statement_ms,
                **parsed.query,
            }
        engine = create_engine(parsed, **options)
    except (ArgumentError, NoSuchModuleError) as error:
        raise _invalid_url_error(url) from error
    except OSError as error:
        raise RegistryError(
            f"The registry's folder cannot be made: {error}. Set TANDEM_HOME to another one."
        ) from error
    except ModuleNotFoundError as error:
        raise RegistryError(
            f"{error.name}, the driver of {parsed.drivername}, is not installed. `pip install {error.name}` brings it; "
            "postgresql:// needs psycopg, which is a part of Tandem."
        ) from error
    if engine.dialect.name == "postgresql":
        connections = _CONNECTIONS[engine] = weakref.WeakSet()
        event.listen(engine, "connect", lambda connection, _: connections.add(connection))
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", lambda connection, _: _on_sqlite_connect(connection, timeouts))
        event.listen(engine, "begin", _on_sqlite_begin)
    return engine


def break_connections(engine: Engine) -> None:
    """End an engine's connections to PostgreSQL, and with an error what threads are doing on them; the next use opens new ones.

    A server that is stopped, or that a network hides, answers neither a statement nor its time-out.
    """
    for connection in list(_CONNECTIONS.get(engine, ())):
        with contextlib.suppress(Exception):  # closed meanwhile, in one of several ways
            # A copy of the descriptor: the connection itself belongs to the thread that waits for it.
            with socket.socket(fileno=os.dup(connection.fileno())) as copy:
                copy.shutdown(socket.SHUT_RDWR)
    engine.dispose()


@contextlib.contextmanager
def database_errors(url: URL) -> Iterator[None]:
    """Turn errors of a database into a RegistryError that names it, password hidden.

    A full disk is a StorageError, and what may pass by itself (no connection, a lock) a RegistryUnreachableError.
    """
    try:
        yield
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error)
        if "disk is full" in reason:
            raise StorageError(
                f"The disk is full while writing the registry {redacted_url(url)}. Free some space."
            ) from error
        error_class = RegistryUnreachableError if isinstance(error, UNAVAILABLE_ERRORS) else RegistryError
        raise error_class(
            f"The registry {redacted_url(url)} refused: {sentence(reason)} Check that it can be reached and written "
            "(TANDEM_HOME, or TANDEM_DATABASE_URL where that is set)."
        ) from error


def _create_private(file: Path) -> None:
    """Make an empty database that its owner alone can read; SQLite gives the files beside it the same mode.

    One that exists is not opened: to close it would end the locks of all connections that this process has to it.
    """
    with contextlib.suppress(FileExistsError):
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _on_sqlite_connect(connection: Any, timeouts: Timeouts) -> None:
    # No implicit transactions: the driver's own would leave DDL outside them.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={timeouts.statement_ms}")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _on_sqlite_begin(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN"))


def _file(url: URL) -> Path | None:
    """The file of an SQLite database, None for one in memory or of another kind."""
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:") or "mode=memory" in str(url):
        return None
    return Path(str(url.database))


def _revision(engine: Engine) -> str | None:
    """The schema's revision, None where there are no tables; RegistryError where a newer Tandem made them."""
    with engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        revision: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
    if revision is not None and revision > REVISION:
        raise RegistryError(
            f"The registry is at schema {revision} and this Tandem knows up to {REVISION}. Upgrade Tandem, "
            "or set TANDEM_HOME to another folder."
        )
    return revision


def _missing_message(url: URL) -> str:
    if url.get_backend_name() == "sqlite":
        return (
            f"There is no registry at {redacted_url(url)} on {socket.gethostname()}. All nodes must use the same one: set "
            "TANDEM_DATABASE_URL to a PostgreSQL database."
        )
    return f"The database {redacted_url(url)} has no registry in it yet. Run `tandem db upgrade`."


def _outdated_message(url: URL, revision: str) -> str:
    return f"The registry {redacted_url(url)} is at schema {revision} and this Tandem needs {REVISION}. Run `tandem db upgrade`."


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


@contextlib.contextmanager
def _migration_lock(engine: Engine) -> Iterator[None]:
    """Held by the one process that migrates: a file lock beside an SQLite file; on PostgreSQL its own, which reaches other nodes.

    A database in memory is its process's alone.
    """
    if engine.dialect.name == "postgresql":
        with engine.connect() as connection:
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": ADVISORY_LOCK})
            try:
                yield
            finally:
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": ADVISORY_LOCK})
        return
    file = _file(engine.url)
    if file is None:
        yield
        return
    path = file.with_name(f"{file.name}.lock")
    with disk_errors("creating the registry", path):
        lock = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)
