"""Copies of a whole database in a file, independent of its kind: from SQLite to PostgreSQL, too.

The file is gzip of JSON lines: a head, each row with its table, and the number of rows, by which a truncated file is known.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import operator
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from sqlalchemy import Connection, LargeBinary, Table, delete, func, insert, select, text

from tandem.db.database import database_errors, open_database, redacted_url
from tandem.db.schema import REVISION, Base, ClockRow, IdentityRow, ModelRow, UtcDateTime
from tandem.errors import RegistryError
from tandem.storage import disk_errors

FORMAT = 1
ROWS_AT_ONCE = 500
OF_NEW_REGISTRY = (IdentityRow.__tablename__, ClockRow.__tablename__)
"""Tables that have a row in a new registry."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Copied:
    """A backup that was written or restored."""

    redacted_url: str
    """The database's URL, password hidden."""
    identity: str
    rows: int


def backup(url: str, file: Path) -> Copied:
    """Write all rows of a database, as they are at one moment, to a new file that its owner alone can read.

    RegistryError if there is no registry, or the file exists.
    """
    engine = open_database(url, create=False)
    # SQLite's transactions see one moment anyway.
    isolated = engine.execution_options(isolation_level="REPEATABLE READ") if engine.name == "postgresql" else engine
    staging = file.with_name(f".{file.name}.part")
    if file.exists():
        raise RegistryError(f"{file} exists; choose another name.")
    try:
        with disk_errors("writing", file), database_errors(engine.url), isolated.begin() as connection:
            identity = connection.execute(select(IdentityRow.id)).scalar_one()
            head = {
                "tandem_backup": FORMAT,
                "revision": REVISION,
                "identity": identity,
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            count = 0
            staging.unlink(missing_ok=True)
            with (
                open(os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as raw,
                gzip.open(raw, "wt", encoding="utf-8") as lines,
            ):
                _write(lines, head)
                for table in Base.metadata.sorted_tables:
                    for row in _rows(connection, table):
                        _write(lines, {"table": table.name, "row": row})
                        count += 1
                _write(lines, {"rows": count})
            staging.rename(file)
    finally:
        staging.unlink(missing_ok=True)
        engine.dispose()
    return Copied(redacted_url=redacted_url(engine.url), identity=identity, rows=count)


def restore(url: str, file: Path) -> Copied:
    """Fill an empty database with a backup, whole or not at all. It has the identity of the one that was copied.

    RegistryError if the database has a registry already, or the file is not whole or of another version's schema.
    """
    _check(file)
    engine = open_database(url, create=True)
    tables = {table.name: table for table in Base.metadata.sorted_tables}
    try:
        with database_errors(engine.url), engine.begin() as connection:
            for table in reversed(Base.metadata.sorted_tables):
                if table.name in OF_NEW_REGISTRY:
                    connection.execute(delete(table))
                elif connection.execute(select(table).limit(1)).first() is not None:
                    raise RegistryError(
                        f"{redacted_url(engine.url)} has a registry already. Restore into an empty database, or remove that one "
                        "first."
                    )
            count = 0
            table_lines = (line for line in _lines(file) if "table" in line)
            for name, lines in itertools.groupby(table_lines, operator.itemgetter("table")):
                while rows := [_from_json(tables[name], line["row"]) for line in itertools.islice(lines, ROWS_AT_ONCE)]:
                    connection.execute(insert(tables[name]), rows)
                    count += len(rows)
            if engine.name == "postgresql":
                _set_sequences(connection)
            identity = connection.execute(select(IdentityRow.id)).scalar_one()
    finally:
        engine.dispose()
    return Copied(redacted_url=redacted_url(engine.url), identity=identity, rows=count)


def _rows(connection: Connection, table: Table) -> Iterator[dict[str, Any]]:
    # A base comes before its adapters: they were registered later.
    order = [table.c.revision] if table.name == ModelRow.__tablename__ else list(table.primary_key.columns)
    result = connection.execution_options(yield_per=ROWS_AT_ONCE).execute(select(table).order_by(*order))
    for row in result.mappings():
        yield {name: _to_json(value) for name, value in row.items()}


def _to_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if isinstance(value, datetime) else value


def _from_json(table: Table, row: dict[str, Any]) -> dict[str, Any]:
    def column_value(name: str, value: Any) -> Any:
        if value is not None and isinstance(table.c[name].type, LargeBinary):
            return base64.b64decode(value)
        is_time = value is not None and isinstance(table.c[name].type, UtcDateTime)
        return datetime.fromisoformat(value) if is_time else value

    return {name: column_value(name, value) for name, value in row.items()}


def _check(file: Path) -> None:
    """RegistryError unless a file is a whole backup of this version's schema."""
    lines = _lines(file)
    head = next(lines, {})
    if head.get("tandem_backup") != FORMAT:
        raise RegistryError(f"{file} is no backup of `tandem db backup`.")
    if head["revision"] != REVISION:
        raise RegistryError(
            f"{file} is a backup of schema {head['revision']}, and this Tandem has schema {REVISION}. Restore it with the Tandem "
            "that wrote it; then run `tandem db upgrade` with this one."
        )
    count, last = 0, head
    for last in lines:
        count += "table" in last
    if last.get("rows") != count:
        raise RegistryError(f"{file} is not whole: its last rows are missing. Restore another backup.")


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)
    except FileNotFoundError as error:
        raise RegistryError(f"There is no file {file}.") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise RegistryError(f"{file} cannot be read as a backup: {error}.") from error


def _write(lines: IO[str], value: dict[str, Any]) -> None:
    lines.write(json.dumps(value) + "\n")


def _set_sequences(connection: Connection) -> None:
    """Let numbers that PostgreSQL gives out go on after those that were inserted."""
    for table in Base.metadata.sorted_tables:
        column = table.autoincrement_column
        if column is None:
            continue
        newest = connection.execute(select(func.max(column))).scalar()
        sequence = connection.execute(
            text("SELECT pg_get_serial_sequence(:table, :column)"), {"table": table.name, "column": column.name}
        ).scalar_one()
        if newest and sequence:
            connection.execute(text("SELECT setval(:sequence, :newest)"), {"sequence": sequence, "newest": newest})
