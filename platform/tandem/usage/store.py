"""Usage in the database: exact addition of batches, and sums by any of the labels."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from tandem.db.inserts import insert_into
from tandem.db.schema import ApiKeyRow, UsageRow, UsageWriterRow
from tandem.errors import ConfigError, did_you_mean
from tandem.registry.connection import RegistryConnection
from tandem.usage.records import UsageCounts, UsageKey

GROUPS = ("hour", "day", "tenant", "key_id", "model", "adapter", "route")
"""Columns that sums can be grouped by."""
COUNTS = UsageCounts._fields
NAMES_OF_QUERY = 500
"""Keys or tenants in one query of their sums."""
ROWS_OF_STATEMENT = 1000
"""Rows that are added in one statement: one round trip for nearly every batch."""
FORGET_WRITERS_AFTER = timedelta(days=7)
"""A process that has written nothing for so long does not repeat a batch any more."""


class UsageStore(RegistryConnection):
    """Usage in a registry's database. Does not change the registry's revision."""

    def add(self, writer: str, sequence: int, batch: Mapping[UsageKey, UsageCounts]) -> bool:
        """Add the counts of a batch; False for one that was added before.

        `sequence` grows by one with each batch of a writer: where the answer of the database was lost, the same batch with the
        same number can be sent again.
        """
        with self._adding() as session:
            if not self._claim(session, writer, sequence):
                return False
            # In one order: two writers that add to the same rows cannot wait for each other.
            rows = [
                {"hour": key.hour, **key.labels._asdict(), **counts._asdict()} for key, counts in sorted(batch.items())
            ]
            for start in range(0, len(rows), ROWS_OF_STATEMENT):
                statement = insert_into(session, UsageRow).values(rows[start : start + ROWS_OF_STATEMENT])
                sums = {name: getattr(UsageRow, name) + statement.excluded[name] for name in COUNTS}
                session.execute(
                    statement.on_conflict_do_update(index_elements=list(UsageRow.__table__.primary_key), set_=sums)
                )
            return True

    def _claim(self, session: Session, writer: str, sequence: int) -> bool:
        """Take the number of a batch; False if it was taken before."""
        now = datetime.now(UTC)
        if sequence == 1:
            session.execute(delete(UsageWriterRow).where(UsageWriterRow.at < now - FORGET_WRITERS_AFTER))
        updated = session.execute(
            update(UsageWriterRow)
            .where(UsageWriterRow.id == writer, UsageWriterRow.sequence < sequence)
            .values(sequence=sequence, at=now)
        )
        if updated.rowcount:  # type: ignore[attr-defined]
            return True
        if session.get(UsageWriterRow, writer) is not None:
            return False
        session.add(UsageWriterRow(id=writer, sequence=sequence, at=now))
        session.flush()
        return True

    def sums(
        self,
        by: Sequence[str],
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        tenant: str | None = None,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[dict[str, Any]]:
        """Sums of the counts from the hour of `since` to `until`, one for each combination of the columns `by`, in their order.

        ConfigError for a column that there is not.
        """
        for name in by:
            if name not in GROUPS:
                raise ConfigError(
                    f"There is no column {name[:80]!r}.{did_you_mean(name, GROUPS)} Group by {', '.join(GROUPS)}."
                )
        columns: list[Any] = [_day().label("day") if name == "day" else getattr(UsageRow, name) for name in by]
        query = select(*columns, *(func.sum(getattr(UsageRow, name)).label(name) for name in COUNTS))
        if since is not None:
            query = query.where(UsageRow.hour >= start_of_hour(since))
        if until is not None:
            query = query.where(UsageRow.hour < until)
        if tenant is not None:
            query = query.where(UsageRow.tenant == tenant)
        query = query.group_by(*columns).order_by(*columns).limit(limit).offset(offset)
        with self._reading() as session:
            rows = [row._asdict() for row in session.execute(query)]
        for row in rows:
            row.update((name, int(row[name] or 0)) for name in COUNTS)
            if isinstance(row.get("hour"), datetime):
                row["hour"] = row["hour"].isoformat()
            if "day" in row:
                row["day"] = str(row["day"])[:10]
        return rows

    def tokens_today(self, now: datetime, keys: Collection[str], tenants: Collection[str]) -> dict[str, int]:
        """Tokens of prompts and answers since midnight UTC, by `key:ID` and `tenant:NAME`, of these keys and tenants alone.

        The tokens of a key include those of the keys that it was rotated from (`ApiKeyRow.origin`).
        """
        midnight = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        tokens = func.sum(UsageRow.prompt_tokens + UsageRow.completion_tokens)
        totals: dict[str, int] = {}
        with self._reading() as session:
            key = func.coalesce(ApiKeyRow.origin, UsageRow.key_id)
            for kind, column, names in (("key", key, keys), ("tenant", UsageRow.tenant, tenants)):
                sorted_names = sorted(names)
                for start in range(0, len(sorted_names), NAMES_OF_QUERY):
                    chunk = sorted_names[start : start + NAMES_OF_QUERY]
                    rows = select(column, tokens).select_from(UsageRow)
                    if kind == "key":
                        rows = rows.outerjoin(ApiKeyRow, ApiKeyRow.id == UsageRow.key_id)
                    query = rows.where(UsageRow.hour >= midnight, column.in_(chunk)).group_by(column)
                    totals.update((f"{kind}:{name}", int(total or 0)) for name, total in session.execute(query))
        return totals


def _day() -> Any:
    return func.date(UsageRow.hour)


def start_of_hour(time: datetime) -> datetime:
    """The beginning of its hour in UTC: counts are kept by the hour."""
    return time.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
