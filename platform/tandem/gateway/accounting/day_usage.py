"""Today's tokens of the keys and tenants that have a budget by the day, read from the database off the event loop."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from tandem.auth.key_table import Budgets
from tandem.limits import DayTotals, Moment
from tandem.registry.timed_calls import TimedCalls
from tandem.usage import UsageStore

READ_S = 4.0
"""Seconds that the database may take for a read."""


class DayUsage:
    """Reads of one gateway, in a thread of their own."""

    def __init__(self, usage: UsageStore, budgets: Callable[[], Budgets]) -> None:
        """`usage`: a connection for this object alone. `budgets` returns the subjects to read."""
        self._usage = usage
        self._budgets = budgets
        self._calls = TimedCalls(usage, "limits")

    async def read(self) -> DayTotals:
        """The tokens of today; without budgets no query is made. TimeoutError after `READ_S`."""
        now, budgets = Moment.now(), self._budgets()
        if not budgets.keys and not budgets.tenants:
            return DayTotals(now.day, {})
        day = datetime.fromtimestamp(now.wall, UTC)
        tokens = await self._calls.run(READ_S, self._usage.tokens_today, day, budgets.keys, budgets.tenants)
        return DayTotals(now.day, tokens)

    def close(self) -> None:
        """End the thread and its connections."""
        self._calls.close()
