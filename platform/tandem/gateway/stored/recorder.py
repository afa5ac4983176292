"""Recorder of answers: copies those that are to be stored, and writes them to the database off the event loop.

No answer waits for it: what does not fit into `gateway.stored.max_pending_bytes`, or cannot be written within `GIVE_UP_S`, is not
stored, and counted by reason in `lost`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter, deque

from pydantic_core import to_json

from tandem.config.serving.stored import StoredConfig
from tandem.errors import RegistryError, TandemError
from tandem.gateway.stored.recording import AnswerLabels, PendingBytes, Recorded, Recording
from tandem.registry.timed_calls import TimedCalls
from tandem.stored.assembly import assemble
from tandem.stored.content import pack
from tandem.stored.records import NewAnswer
from tandem.stored.store import StoredAnswers
from tandem.tasks import stop

WRITE_S = 10.0
"""Seconds that the database may take for one answer before it is tried again."""
RETRY_S = 0.5
"""Seconds before the next attempt."""
GIVE_UP_S = 60.0
"""Seconds for which the oldest answer is tried; then it is lost."""
LAST_WRITE_S = 10.0
"""Seconds that a gateway which ends waits for the database."""
EXPIRY_S = 600.0
"""Seconds between two rounds of the removal of expired answers."""
LONGEST_ID = 128

log = logging.getLogger(__name__)


class Recorder:
    """The answers that one gateway stores."""

    def __init__(self, store: StoredAnswers, config: StoredConfig) -> None:
        """`store`: connections of its own."""
        self.lost: Counter[str] = Counter()
        """Answers that were to be stored and could not be, by reason."""
        self._store = store
        self._config = config
        self._pending = PendingBytes(config.max_pending_bytes)
        self._recordings: Counter[str] = Counter()
        """Answers under way, by tenant."""
        self._queue: deque[Recorded] = deque()
        self._queued: Counter[str] = Counter()
        """Whole answers that are not written yet, by tenant."""
        self._added = asyncio.Event()
        self._calls = TimedCalls(store, "stored-answers")
        self._tasks: list[asyncio.Task[None]] = []

    def open(self, labels: AnswerLabels, request: bytes) -> Recording:
        """The recording of one answer to the body `request`. Its `lost` says at once if the request alone does not fit."""
        self._recordings[labels.tenant] += 1
        return Recording(
            labels, request, max_bytes=self._config.max_bytes, pending=self._pending, on_end=self._recording_ended
        )

    def awaits_write(self, tenant: str) -> bool:
        """Whether this gateway has whole answers of a tenant that are not written yet."""
        return self._queued[tenant] > 0

    def is_recording(self, tenant: str) -> bool:
        """Whether this gateway has answers of a tenant under way, or whole ones that are not written yet."""
        return self._recordings[tenant] > 0 or self._queued[tenant] > 0

    def start(self) -> None:
        """Begin to write; needs a running event loop."""
        self._tasks = [asyncio.create_task(self._write_all()), asyncio.create_task(self._expire())]

    async def stop(self) -> None:
        """Write what is whole, for `LAST_WRITE_S` at most."""
        for task in self._tasks:
            await stop(task)
        try:
            async with asyncio.timeout(LAST_WRITE_S):
                await self._write_queue()
        except (TimeoutError, TandemError):
            self._count_lost("gateway_ended", len(self._queue))
        self._calls.close()

    def _recording_ended(self, recording: Recording, recorded: Recorded | None) -> None:
        _decrease(self._recordings, recording.tenant)
        if recorded is not None:
            self._queued[recording.tenant] += 1
            self._queue.append(recorded)
            self._added.set()
        elif recording.lost:
            self._count_lost(recording.lost, 1)

    async def _write_all(self) -> None:
        failing_since = 0.0
        while True:
            await self._added.wait()
            self._added.clear()
            try:
                await self._write_queue()
                failing_since = 0.0
            except Exception as error:  # noqa: BLE001 - the next attempt may succeed
                failing_since = failing_since or time.monotonic()
                if time.monotonic() - failing_since > GIVE_UP_S or not _may_pass(error):
                    self._take_first()
                    self._count_lost("database", 1, str(error) or type(error).__name__)
                await asyncio.sleep(RETRY_S)
                self._added.set()

    async def _write_queue(self) -> None:
        while self._queue:
            reason = await self._calls.run(WRITE_S, self._write, self._queue[0])
            self._take_first()
            if reason:
                self._count_lost(reason, 1)

    def _take_first(self) -> None:
        recorded = self._queue.popleft()
        _decrease(self._queued, recorded.labels.tenant)
        self._pending.give_back(recorded.num_bytes)

    def _write(self, recorded: Recorded) -> str:
        """Store one answer; why it cannot be stored, empty if it is. Runs in a thread."""
        labels = recorded.labels
        answer = assemble(labels.kind, b"".join(recorded.chunks), is_stream=recorded.is_stream)
        if answer is None or not 0 < len(answer["id"]) <= LONGEST_ID:
            return "unreadable"
        if labels.previous_id is not None:
            answer["previous_response_id"] = labels.previous_id
        raw_bytes, content = pack(recorded.request, to_json(answer))
        new = NewAnswer(
            id=answer["id"],
            tenant=labels.tenant,
            kind=labels.kind,
            key_id=labels.key_id,
            model=labels.model[:255],
            answered_model=str(answer.get("model", ""))[:255],
            metadata=labels.metadata,
            previous_id=labels.previous_id,
            raw_bytes=raw_bytes,
            content=content,
            lifetime_days=self._config.days,
            idempotency_key=labels.idempotency_key,
        )
        return "" if self._store.add(new, tenant_bytes=self._config.tenant_bytes) else "tenant_full"

    def _count_lost(self, reason: str, count: int, detail: str = "") -> None:
        if count:
            self.lost[reason] += count
            log.warning("%d answers were not stored: %s %s(%d so far).", count, reason, detail, self.lost[reason])

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_S * random.uniform(0.5, 1.5))
            try:
                while await self._calls.run(WRITE_S, self._store.expire):
                    pass
            except Exception as error:  # noqa: BLE001 - the next round may succeed
                log.warning("Expired answers could not be deleted: %s. They are later.", error)


def _may_pass(error: Exception) -> bool:
    """Whether a write may succeed later: the database is away or slow, or its disk is full."""
    return not isinstance(error, RegistryError) or type(error) is not RegistryError


def _decrease(counts: Counter[str], key: str) -> None:
    counts[key] -= 1
    if counts[key] <= 0:
        del counts[key]
