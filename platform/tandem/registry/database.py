"""Opens the registry's database: connection rules for SQLite, and the schema brought up to date under a lock."""

from __future__ import annotations

import contextlib
import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import (
    ArgumentError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import StaticPool

from tandem.errors import RegistryError, RegistryUnreachableError, StorageError
from tandem.ids import digest
from tandem.registry.schema import REVISION
from tandem.storage import disk_errors

BUSY_TIMEOUT_MS = 30_000
"""How long a writer waits for another before SQLite calls the database locked."""
PASSING = (OperationalError, InterfaceError, PoolTimeoutError)
"""What drivers and SQLAlchemy's pool raise where the database is at fault, rather than what was asked of it."""
ADVISORY_LOCK = 7_263_001
"""PostgreSQL's advisory lock that migrations hold."""


def open_database(url: str) -> Engine:
    """An engine whose schema is up to date; creates the database and its folder where there is none.

    Several processes may open a fresh database at once. RegistryError if it cannot be opened, or if a newer Tandem
    wrote it.
    """
    engine = connect(url)
    with database_errors(engine.url):
        if _at_revision(engine):
            return engine
        with _migration_lock(engine):
            if _file(engine.url):
                # Kept in the file from then on. Switching does not wait for other connections: hence in the lock.
                with engine.connect() as connection:
                    connection.connection.cursor().execute("PRAGMA journal_mode=WAL")
            with engine.begin() as connection:
                _upgrade(connection)
    return engine


def connect(url: str) -> Engine:
    """An engine with Tandem's connection rules and the schema as it is; RegistryError for a URL that is none."""
    try:
        parsed = make_url(url)
        options: dict[str, Any] = {"pool_pre_ping": True}
        if parsed.get_backend_name() == "sqlite":
            options = {"connect_args": {"timeout": BUSY_TIMEOUT_MS / 1000, "check_same_thread": False}}
            if file := _file(parsed):
                with disk_errors("creating the registry", file):
                    file.parent.mkdir(parents=True, exist_ok=True)
            else:
                options["poolclass"] = StaticPool  # one connection: each new one would be another empty database
        engine = create_engine(parsed, **options)
    except (ArgumentError, NoSuchModuleError) as error:
        raise RegistryError(f"{url!r} is not a database URL: {error}. Set TANDEM_DATABASE_URL to one.") from error
    except OSError as error:
        raise RegistryError(
            f"The registry's folder cannot be made: {error}. Set TANDEM_HOME to another one."
        ) from error
    except ModuleNotFoundError as error:
        raise RegistryError(f"{error.name}, the driver of {parsed.drivername}, is not installed.") from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _on_sqlite_connect)
        event.listen(engine, "begin", _on_sqlite_begin)
    return engine


@contextlib.contextmanager
def database_errors(url: URL) -> Iterator[None]:
    """Turn what a database refuses into a RegistryError that names it, password hidden.

    A full disk is a StorageError, and what may pass by itself (no connection, a lock) a RegistryUnreachableError.
    """
    try:
        yield
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error)
        shown = url.render_as_string(hide_password=True)
        if "disk is full" in reason:
            raise StorageError(f"The disk is full while writing the registry {shown}. Free some space.") from error
        kind = RegistryUnreachableError if isinstance(error, PASSING) else RegistryError
        raise kind(
            f"The registry {shown} refused: {reason}. Check that it can be reached and written "
            "(TANDEM_HOME, or TANDEM_DATABASE_URL where that is set)."
        ) from error


def _on_sqlite_connect(connection: Any, _record: Any) -> None:
    # No implicit transactions: the driver's own would leave DDL outside them.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _on_sqlite_begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _file(url: URL) -> Path | None:
    """The file of an SQLite database, None for one in memory or of another kind."""
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:") or "mode=memory" in str(url):
        return None
    return Path(str(url.database))


def _at_revision(engine: Engine) -> bool:
    with engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return False
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
    if found is not None and found > REVISION:
        raise RegistryError(
            f"The registry is at schema {found} and this Tandem knows up to {REVISION}. Upgrade Tandem, "
            "or set TANDEM_HOME to another folder."
        )
    return found == REVISION


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


@contextlib.contextmanager
def _migration_lock(engine: Engine) -> Iterator[None]:
    """Held by the one process that migrates; a file lock except on PostgreSQL, where it reaches other machines."""
    if engine.dialect.name == "postgresql":
        with engine.connect() as connection:
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": ADVISORY_LOCK})
            try:
                yield
            finally:
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": ADVISORY_LOCK})
        return
    file = _file(engine.url)
    name = f"tandem-{digest(str(engine.url))[:16]}.lock"
    path = file.with_name(f"{file.name}.lock") if file else Path(tempfile.gettempdir()) / name
    with disk_errors("creating the registry", path), path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
