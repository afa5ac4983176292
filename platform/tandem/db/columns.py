"""Base class, types and lengths of columns that the tables share."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import BigInteger, DateTime, Dialect, Integer, String
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.types import TypeDecorator, TypeEngine

# A name has at most 96 characters (ids.NAME_PATTERN); an id adds "@" and a version.
NAME_LENGTH, ID_LENGTH = 96, 120


def ordered_text(length: int) -> String:
    """Text that is ordered by code points on every database, as Python orders it: pages of a list depend on it."""
    return String(length).with_variant(String(length, collation="C"), "postgresql")


def row_number() -> TypeEngine[int]:
    """The type of a primary key that the database counts up; SQLite does so for INTEGER alone."""
    return BigInteger().with_variant(Integer(), "sqlite")


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime, kept as UTC without a zone because SQLite has no zones."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To UTC, zone dropped."""
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """The zone put back."""
        return None if value is None else value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    """Root of the tables."""
