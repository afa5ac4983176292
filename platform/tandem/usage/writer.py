"""Writer of usage: adds up records in memory and writes them to the database in batches, off the event loop.

A thousand replicas write to one database: each has a connection only while it writes, at times of its own, and less often where
the database is slow.

A batch that could not be written is kept and written again under its own number, so that nothing is lost or counted twice. Memory
is bounded by the number of different labels in an hour.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
import uuid
from collections.abc import Mapping

from tandem.registry.timed_calls import TimedCalls
from tandem.tasks import stop
from tandem.usage.records import UsageCounts, UsageKey, UsageLabels
from tandem.usage.store import UsageStore

FLUSH_S = 2.0
"""Seconds between two batches of a database that is fast."""
LONGEST_FLUSH_S = 30.0
"""Seconds between two batches of a database that is slow, at most."""
PAUSE = 20
"""Pause between two batches, in multiples of the time that the last one took: a twentieth of the time is spent on writing."""
JITTER = 0.25
"""Share by which each pause is longer or shorter, so that processes which start together do not write together."""
WRITE_S = 10.0
"""Seconds that the database may take for a batch before it is tried again."""
LAST_WRITE_S = 15.0
"""Seconds that a process which ends waits for the database."""

log = logging.getLogger(__name__)


class UsageWriter:
    """The usage of one process. `add` may be called from any thread, the rest from one event loop."""

    def __init__(self, store: UsageStore) -> None:
        self._store = store
        self._id = uuid.uuid4().hex
        self._sequence = 0
        self._records: dict[UsageKey, UsageCounts] = {}
        self._unwritten: dict[UsageKey, UsageCounts] = {}
        """The batch with the number `_sequence`, until the database has it."""
        self._lock = threading.Lock()
        self._calls = TimedCalls(store, "usage")
        self._took_s = 0.0
        """Seconds that the last batch took, or that it was waited for."""
        self._write_task: asyncio.Task[None] | None = None

    def add(self, labels: UsageLabels, counts: UsageCounts) -> None:
        """Count requests that have ended now."""
        key = UsageKey.at(labels, time.time())
        with self._lock:
            previous = self._records.get(key)
            self._records[key] = counts if previous is None else previous.plus(counts)

    def start(self) -> None:
        """Begin to write; needs a running event loop."""
        self._write_task = asyncio.create_task(self._write())

    async def stop(self) -> None:
        """Write the remaining records, and log those that could not be written."""
        await stop(self._write_task)
        deadline = time.monotonic() + LAST_WRITE_S
        while self._unwritten or self._records:
            try:
                await self.flush()
            except Exception as error:  # noqa: BLE001 - tried until the deadline
                if time.monotonic() > deadline:
                    lost_records = [*self._unwritten.items(), *self._records.items()]
                    log.error("Usage could not be written and is lost: %s. The records: %s", error, lost_records)
                    break
                await asyncio.sleep(0.5)
        self._calls.close()

    async def flush(self) -> None:
        """Write everything that was added before."""
        while self._unwritten or self._records:
            if not self._unwritten:
                with self._lock:
                    self._unwritten, self._records = self._records, {}
                self._sequence += 1
            started_at = time.monotonic()
            try:
                await self._calls.run(WRITE_S, self._add, self._sequence, self._unwritten)
            finally:
                self._took_s = time.monotonic() - started_at
            self._unwritten = {}

    @property
    def pause_s(self) -> float:
        """Seconds until the next batch."""
        pause_s = min(LONGEST_FLUSH_S, max(FLUSH_S, PAUSE * self._took_s))
        return pause_s * random.uniform(1 - JITTER, 1 + JITTER)

    def _add(self, sequence: int, batch: Mapping[UsageKey, UsageCounts]) -> None:
        """Write a batch, and leave no connection open."""
        try:
            self._store.add(self._id, sequence, batch)
        finally:
            self._store.close()

    async def _write(self) -> None:
        while True:
            await asyncio.sleep(self.pause_s)
            try:
                await self.flush()
            except Exception as error:  # noqa: BLE001 - the next attempt may succeed
                log.warning("Usage could not be written: %s. It is kept.", str(error) or type(error).__name__)
