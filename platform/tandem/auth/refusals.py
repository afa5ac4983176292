"""Refused credentials between two writes of the audit log: equal ones are counted, within limits of memory and rows. Pure.

Of a flood the log has `BURST` rows, then one more every `ROW_EVERY_S`, and one row a minute with the number of all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from tandem.db.audit import Change

ACTION = "credentials.refused"
OTHERS = "others"
"""Target of the row that counts those without a row of their own."""
MAX_KINDS = 1000
"""Different refusals with a count of their own between two writes; further ones are counted together."""
BURST = 1000
"""Rows that may be written at once, by one gateway."""
ROW_EVERY_S = 10.0
"""Seconds after which one more row may be written: 8,640 a day."""
OTHERS_EVERY_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """One refused request; equal ones are counted together."""

    status: int
    code: str
    address: str | None
    by: str = ""
    """The id of a key that is valid and may not do this; empty: the credential is not valid."""
    target: str = ""
    """Method and route."""


@dataclass(slots=True)
class _Count:
    first_at: datetime
    last_at: datetime
    number: int = 0
    hint: str | None = None


class Refusals:
    """Refusals since the last `take`."""

    def __init__(self) -> None:
        self._counts: dict[Refusal, _Count] = {}
        self._others: _Count | None = None
        self._row_budget = float(BURST)
        self._refilled: datetime | None = None
        self._others_at: datetime | None = None

    def add(self, refusal: Refusal, now: datetime, hint: str | None = None) -> None:
        """Count one. `hint`: the first characters of what was sent, kept of the first of its kind that has one."""
        count = self._counts.get(refusal)
        if count is None:
            if len(self._counts) >= MAX_KINDS:
                self._add_others(now, now, 1)
                return
            count = self._counts[refusal] = _Count(first_at=now, last_at=now, hint=hint)
        count.number += 1
        count.last_at = now
        count.hint = count.hint or hint

    def take(self, now: datetime, *, final: bool = False) -> list[Change]:
        """The rows to write; `final`: with the count of the others, however recently one was written."""
        if self._refilled is not None:
            elapsed = max(0.0, (now - self._refilled).total_seconds())
            self._row_budget = min(float(BURST), self._row_budget + elapsed / ROW_EVERY_S)
        self._refilled = now
        # Valid keys first: these have owners. Of the rest the most frequent.
        ordered = sorted(self._counts.items(), key=lambda item: (not item[0].by, -item[1].number))
        self._counts = {}
        rows = []
        for refusal, count in ordered:
            if self._row_budget >= 1:
                self._row_budget -= 1
                rows.append(_row(refusal, count))
            else:
                self._add_others(count.first_at, count.last_at, count.number)
        is_due = final or self._others_at is None or now - self._others_at >= timedelta(seconds=OTHERS_EVERY_S)
        if self._others is not None and is_due:
            rows.append(_row(Refusal(status=0, code="", address=None, target=OTHERS), self._others))
            self._others, self._others_at = None, now
        return rows

    def put_back(self, number: int, now: datetime) -> None:
        """Count rows that could not be written among the others."""
        self._add_others(now, now, number)

    def _add_others(self, first_at: datetime, last_at: datetime, number: int) -> None:
        if self._others is None:
            self._others = _Count(first_at=first_at, last_at=last_at)
        self._others.number += number
        self._others.first_at, self._others.last_at = (
            min(self._others.first_at, first_at),
            max(self._others.last_at, last_at),
        )


def _row(refusal: Refusal, count: _Count) -> Change:
    fields = {"count": count.number, "last_at": count.last_at.isoformat()}
    if refusal.status:
        fields |= {"status": refusal.status, "code": refusal.code}
    if count.hint is not None:
        fields["hint"] = count.hint
    return Change(
        by=refusal.by,
        action=ACTION,
        target=refusal.target,
        address=refusal.address,
        after=fields,
        at=count.first_at,
    )
