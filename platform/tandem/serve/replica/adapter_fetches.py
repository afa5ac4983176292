"""Fetches of adapter files in threads of their own, with a time-out: a store that hangs takes none that other work needs.

Each fetch has a daemon thread, so that one that hangs neither holds a place in a pool nor keeps the process from ending.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from tandem.engine.protocol import AdapterRef
from tandem.errors import StorageError
from tandem.storage import is_remote

FETCH_TIMEOUT_S = 180.0
"""Seconds that the files of one adapter may take to be brought here and checked."""
MAX_CONCURRENT = 4
"""Fetches at a time from stores, and as many from file systems."""
MAX_HANGING = 16
"""Fetches that took too long and have not ended; with so many, stores are not asked again until one ends."""

Prepare = Callable[[AdapterRef], AdapterRef]


class AdapterFetches:
    """Runs `prepare` for adapters; used in one event loop."""

    def __init__(self, prepare: Prepare) -> None:
        """`prepare` brings an adapter's files here and checks them; it raises AdapterError or StorageError."""
        self._prepare = prepare
        self._semaphores = {remote: asyncio.Semaphore(MAX_CONCURRENT) for remote in (True, False)}
        self._hanging: set[threading.Thread] = set()

    async def fetch(self, adapter: AdapterRef) -> AdapterRef:
        """The adapter with a path on this node.

        Raises what `prepare` raises, and StorageError where it takes longer than `FETCH_TIMEOUT_S`.
        """
        async with self._semaphores[is_remote(adapter.path)]:
            self._hanging = {thread for thread in self._hanging if thread.is_alive()}
            if len(self._hanging) >= MAX_HANGING:
                raise StorageError(
                    f"{len(self._hanging)} fetches of adapters hang on this replica, so {adapter.id} is not fetched. Check the "
                    "stores that adapters are in."
                )
            loop = asyncio.get_running_loop()
            future: asyncio.Future[AdapterRef] = loop.create_future()
            thread = threading.Thread(target=self._run, args=(adapter, loop, future), name="adapter-fetch", daemon=True)
            thread.start()
            try:
                async with asyncio.timeout(FETCH_TIMEOUT_S):
                    return await future
            except TimeoutError:
                raise StorageError(
                    f"The files of {adapter.id} were not here within {FETCH_TIMEOUT_S:g} s. Check the store that they are in."
                ) from None
            finally:
                self._hanging.add(thread)

    def _run(self, adapter: AdapterRef, loop: asyncio.AbstractEventLoop, future: asyncio.Future[AdapterRef]) -> None:
        try:
            prepared, error = self._prepare(adapter), None
        except BaseException as raised:  # noqa: BLE001 - it is raised where the fetch is awaited
            prepared, error = adapter, raised

        def settle() -> None:
            if future.done():
                return
            if error is None:
                future.set_result(prepared)
            else:
                future.set_exception(error)

        try:
            loop.call_soon_threadsafe(settle)
        except RuntimeError:
            pass  # the loop is closed
