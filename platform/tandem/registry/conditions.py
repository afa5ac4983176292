"""Conditions of changes: what a name must still mean, and that a request sent twice changes something once."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import delete
from sqlalchemy.orm import Session

from tandem.db.schema import IdempotencyRow, NameRow
from tandem.errors import ChangedMeanwhileError

KEPT_S = 600
"""Seconds for which an idempotency key is remembered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """What must hold for a change of a name to be made."""

    expected: str | None = None
    """Id of the version that the name must mean; None: any."""
    once: str | None = None
    """The change is made once only under this key (SHA-256, hexadecimal); None: each time."""


ALWAYS = Condition()


def result_of_earlier(session: Session, condition: Condition) -> str | None:
    """The id that a change under the same key resulted in, if it was made within `KEPT_S`."""
    if condition.once is None:
        return None
    session.execute(delete(IdempotencyRow).where(IdempotencyRow.at < datetime.now(UTC) - timedelta(seconds=KEPT_S)))
    known = session.get(IdempotencyRow, condition.once)
    return None if known is None else known.result


def check(session: Session, condition: Condition, name: str) -> None:
    """ChangedMeanwhileError unless the name means what is expected."""
    if condition.expected is None:
        return
    known = session.get(NameRow, name)
    meant = known.promoted if known is not None else None
    if meant != condition.expected:
        raise ChangedMeanwhileError(
            f"{name} means {meant or 'no version'} now, and the change expects {condition.expected}. Look at it again, and "
            "repeat the change if it is still wanted."
        )


def remember(session: Session, condition: Condition, result: str) -> None:
    """Note the result of a change under its key, in the change's own transaction."""
    if condition.once is not None:
        session.add(IdempotencyRow(key=condition.once, result=result, at=datetime.now(UTC)))
