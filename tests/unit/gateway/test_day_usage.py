"""Reads of today's tokens for limits by the day."""

from __future__ import annotations

import threading
from collections.abc import Collection
from datetime import datetime
from pathlib import Path

import pytest

from tandem.auth.key_table import Budgets
from tandem.db.database import open_database
from tandem.gateway.accounting import day_usage as module
from tandem.gateway.accounting.day_usage import DayUsage
from tandem.limits import Moment
from tandem.usage import UsageStore


class Recording(UsageStore):
    """Notes the threads that read; the first read ends only when it is released."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.released = threading.Event()
        self.threads: list[str] = []

    def tokens_today(self, now: datetime, keys: Collection[str], tenants: Collection[str]) -> dict[str, int]:
        self.threads.append(threading.current_thread().name)
        if len(self.threads) == 1:
            self.released.wait()
        return {f"key:{key}": 1 for key in keys} | {f"tenant:{tenant}": 2 for tenant in tenants}


@pytest.fixture
def store(tmp_path: Path) -> Recording:
    url = f"sqlite:///{tmp_path}/tandem.db"
    open_database(url, create=True).dispose()
    return Recording(url)


async def test_without_budgets_the_database_is_not_asked(store: Recording):
    reads = DayUsage(store, Budgets)
    assert await reads.read() == (Moment.now().day, {})
    assert store.threads == []
    reads.close()


async def test_a_read_that_hangs_is_given_up_and_the_next_has_a_thread_of_its_own(
    store: Recording, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "READ_S", 0.2)
    reads = DayUsage(store, lambda: Budgets(frozenset({"a"}), frozenset({"lab"})))
    with pytest.raises(TimeoutError):
        await reads.read()
    assert (await reads.read()).tokens == {"key:a": 1, "tenant:lab": 2}
    assert all(name.startswith("limits") for name in store.threads)  # not those of asyncio
    store.released.set()
    reads.close()
