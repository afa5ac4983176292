"""Conditions of changes: the version that a name must still mean, and a key under which a change is made once only."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import delete
from sqlalchemy.orm import Session

from tandem.db.schema import IdempotencyRow, NameRow
from tandem.errors import ChangedMeanwhileError

RETENTION_S = 600
"""Seconds for which an idempotency key is remembered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """Conditions under which a change of a name is made."""

    expected: str | None = None
    """Id of the version that the name must mean; None: any."""
    once: str | None = None
    """The change is made once only under this key (SHA-256, hexadecimal); None: each time."""


ALWAYS = Condition()


def result_of_earlier(session: Session, condition: Condition) -> str | None:
    """The id that a change under the same key resulted in, if it was made within `RETENTION_S`."""
    if condition.once is None:
        return None
    session.execute(
        delete(IdempotencyRow).where(IdempotencyRow.at < datetime.now(UTC) - timedelta(seconds=RETENTION_S))
    )
    earlier = session.get(IdempotencyRow, condition.once)
    return None if earlier is None else earlier.result


def check(session: Session, condition: Condition, name: str) -> None:
    """ChangedMeanwhileError unless the name means what is expected."""
    if condition.expected is None:
        return
    name_row = session.get(NameRow, name)
    current_id = name_row.promoted if name_row is not None else None
    if current_id != condition.expected:
        raise ChangedMeanwhileError(
            f"{name} means {current_id or 'no version'} now, and the change expects {condition.expected}. Look at it again, and "
            "repeat the change if it is still wanted."
        )


def remember(session: Session, condition: Condition, result: str) -> None:
    """Note the result of a change under its key, in the change's own transaction."""
    if condition.once is not None:
        session.add(IdempotencyRow(key=condition.once, result=result, at=datetime.now(UTC)))
