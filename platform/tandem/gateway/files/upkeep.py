"""Background work on files: checks of uploaded content in a child process, expiry, removal of contents.

Each gateway does all of it for all. A file is checked by one of them at a time, and by another one if that dies.
"""

from __future__ import annotations

import asyncio
import logging
import random

from tandem.files.checks.child import ContentCheck
from tandem.files.content import ContentStore
from tandem.files.janitor import Janitor
from tandem.files.records import FileRecord, FileStatus
from tandem.files.uploads import UploadStore
from tandem.registry.timed_calls import TimedCalls
from tandem.tasks import stop

CHECK_INTERVAL_S, JANITOR_INTERVAL_S, LISTING_INTERVAL_S = 15.0, 60.0, 6 * 3600.0
"""Seconds between two looks for files that are not checked yet, for ended ones, and for contents without a record."""
LEASE_S = 1200.0
"""Seconds that a check may take; then another gateway may begin."""
DATABASE_S, JANITOR_S = 10.0, 600.0
"""Seconds that the database may take for one question, and one round of the janitor."""

log = logging.getLogger(__name__)


class Upkeep:
    """The background tasks of one gateway."""

    def __init__(self, store: UploadStore, contents: ContentStore) -> None:
        """`store`: connections of its own."""
        self._store = store
        self._janitor = Janitor(store, contents)
        self._checks = TimedCalls(store, "file-checks")
        self._removals = TimedCalls(store, "file-janitor")
        self._added, self._ended = asyncio.Event(), asyncio.Event()
        self._check = ContentCheck()
        self._tasks: list[asyncio.Task[None]] = []

    def file_added(self) -> None:
        """A file was added whose content has to be checked."""
        self._added.set()

    def upload_ended(self) -> None:
        """An upload has ended, and its parts are to be removed."""
        self._ended.set()

    def start(self) -> None:
        """Begin; needs a running event loop."""
        self._tasks = [asyncio.create_task(self._check_files()), asyncio.create_task(self._remove_ended())]

    async def stop(self) -> None:
        """End; a check that runs is done again by another gateway, or after the next start."""
        self._check.kill()
        for task in self._tasks:
            await stop(task)
        for calls in (self._checks, self._removals):
            calls.close()

    async def _check_files(self) -> None:
        while True:
            await _wait(self._added, CHECK_INTERVAL_S)
            try:
                while file := await self._checks.run(DATABASE_S, self._store.claim_unchecked, LEASE_S):
                    await self._check_file(file)
            except Exception as error:  # noqa: BLE001 - the next round may succeed
                log.warning(
                    "Uploaded files could not be checked: %s. They are later.", str(error) or type(error).__name__
                )

    async def _check_file(self, file: FileRecord) -> None:
        # Parsing holds the interpreter, and a line may have 10 MB: not in this process.
        report = await asyncio.to_thread(self._check.run, file.purpose, file.location, LEASE_S / 2)
        status = FileStatus.PROCESSED if report.is_valid else FileStatus.ERROR
        details = None if report.is_valid else report.summary()
        await self._checks.run(DATABASE_S, self._store.set_checked, file.id, status, details)

    async def _remove_ended(self) -> None:
        loop = asyncio.get_running_loop()
        listed_at = loop.time() - random.uniform(0, LISTING_INTERVAL_S)
        while True:
            await _wait(self._ended, JANITOR_INTERVAL_S * random.uniform(0.75, 1.25))
            try:
                await self._removals.run(JANITOR_S, self._janitor.remove_ended)
                if loop.time() - listed_at > LISTING_INTERVAL_S:
                    await self._removals.run(JANITOR_S, self._janitor.remove_unrecorded)
                    listed_at = loop.time()
            except Exception as error:  # noqa: BLE001 - the next round may succeed
                log.warning("Ended files could not be removed: %s. They are later.", str(error) or type(error).__name__)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    """Wait until the event is set, at most `timeout_s`, and clear it."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
    event.clear()
