"""Reads of the registry for requests: in a thread of their own, with time-outs, and without waiting while the database is away.

A read that fails or takes too long marks the registry as away. Until it answers again, one read at a time is tried, and all
others fail at once, so that neither requests nor threads pile up behind a database that does not answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from tandem.errors import RegistryError, RegistryUnreachableError, UnknownModelError
from tandem.registry import Registry
from tandem.registry.timed_calls import TimedCalls
from tandem.tasks import stop

POLL_S = 1.0
"""Seconds between two reads of the registry's revision in the background."""
POLL_ANSWER_S = 3.0
"""Seconds that the registry has to answer such a read."""
REVISION_S = 0.5
"""Seconds that a request waits for the registry's revision; after that it uses cached records."""

T = TypeVar("T")
log = logging.getLogger(__name__)


class RegistryReads:
    """One registry, read by one event loop."""

    def __init__(self, registry: Registry, *, name: str) -> None:
        """`registry` is used by this object alone. `name` is that of the thread."""
        self._registry = registry
        self._calls = TimedCalls(registry, name)
        self._unreachable_since: float | None = None
        self._num_reads = 0
        self._revision_task: asyncio.Task[int | None] | None = None
        self._next_revision_task: asyncio.Task[int | None] | None = None
        self._poll_task: asyncio.Task[None] | None = None
        self.on_poll: Callable[[int], None] = lambda revision: None
        """Called with the revision at each read in the background."""

    def start(self) -> None:
        """Begin to read the revision in the background."""
        self._poll_task = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Stop, and end the connections."""
        await stop(self._poll_task)
        self._calls.close()

    @property
    def is_unreachable(self) -> bool:
        """Whether the last read failed or timed out."""
        return self._unreachable_since is not None

    async def read(self, work: Callable[[Registry], T], timeout_s: float) -> T:
        """The result of a read; RegistryUnreachableError if the registry does not answer in time, or is known to be away."""
        if self.is_unreachable and self._num_reads:
            raise RegistryUnreachableError("The registry does not answer; another read is waiting for it already.")
        self._num_reads += 1
        try:
            result = await self._calls.run(timeout_s, work, self._registry)
        except TimeoutError:
            self._mark_unreachable(f"no answer within {timeout_s:g} s")
            raise RegistryUnreachableError(f"The registry did not answer within {timeout_s:g} s.") from None
        except UnknownModelError:
            self._mark_reachable()
            raise
        except RegistryError as error:
            self._mark_unreachable(str(error))
            raise RegistryUnreachableError(str(error)) from error
        finally:
            self._num_reads -= 1
        self._mark_reachable()
        return result

    async def revision(self) -> int | None:
        """The registry's revision, read after this call; None if it does not answer at once.

        Requests that arrive during a read share the one after it.
        """
        if self.is_unreachable:
            return None
        if self._revision_task is None or self._revision_task.done():
            task = self._revision_task = asyncio.create_task(self._revision())
        elif self._next_revision_task is None:
            task = self._next_revision_task = asyncio.create_task(self._revision_after(self._revision_task))
        else:
            task = self._next_revision_task
        # Shielded: a client that disconnects must not cancel the read that others wait for.
        return await asyncio.shield(task)

    async def _revision(self) -> int | None:
        try:
            return await self.read(_revision_of, REVISION_S)
        except RegistryUnreachableError:
            return None

    async def _revision_after(self, current: asyncio.Task[int | None]) -> int | None:
        await asyncio.wait([current])
        self._revision_task, self._next_revision_task = self._next_revision_task, None
        return await self._revision()

    async def _poll(self) -> None:
        while True:
            try:
                self.on_poll(await self.read(_revision_of, POLL_ANSWER_S))
            except RegistryUnreachableError:
                pass
            except Exception:
                log.exception("The registry's revision could not be read; it is read again in %g s.", POLL_S)
            await asyncio.sleep(POLL_S)

    def _mark_unreachable(self, reason: str) -> None:
        if self._unreachable_since is None:
            self._unreachable_since = time.monotonic()
            log.warning("The registry does not answer (%s). Known adapters are served from memory meanwhile.", reason)

    def _mark_reachable(self) -> None:
        if self._unreachable_since is not None:
            log.warning("The registry answers again, after %.0f s.", time.monotonic() - self._unreachable_since)
            self._unreachable_since = None


def _revision_of(registry: Registry) -> int:
    return registry.revision()
