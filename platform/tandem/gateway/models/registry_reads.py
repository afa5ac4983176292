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
"""Seconds between two looks at the registry's revision in the background."""
POLL_ANSWER_S = 3.0
"""Seconds that the registry has to answer such a look."""
REVISION_S = 0.5
"""Seconds that the registry has to tell its revision to a request; after that the request goes on with what is known."""

T = TypeVar("T")
log = logging.getLogger(__name__)


class RegistryReads:
    """One registry, read by one event loop."""

    def __init__(self, registry: Registry, *, name: str) -> None:
        """`registry` is used by this object alone. `name` is that of the thread."""
        self._registry = registry
        self._calls = TimedCalls(registry, name)
        self._away_since: float | None = None
        self._trying = 0
        self._reading: asyncio.Task[int | None] | None = None
        self._next: asyncio.Task[int | None] | None = None
        self._polling: asyncio.Task[None] | None = None
        self.on_poll: Callable[[int], None] = lambda revision: None
        """Called with the revision of each look in the background."""

    def start(self) -> None:
        """Begin to look at the revision in the background."""
        self._polling = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Stop, and end the connections."""
        await stop(self._polling)
        self._calls.close()

    @property
    def away(self) -> bool:
        """Whether the registry did not answer the last time."""
        return self._away_since is not None

    async def read(self, work: Callable[[Registry], T], timeout_s: float) -> T:
        """The result of a read; RegistryUnreachableError if the registry does not answer in time, or is known to be away."""
        if self.away and self._trying:
            raise RegistryUnreachableError("The registry does not answer; another read is waiting for it already.")
        self._trying += 1
        try:
            found = await self._calls.run(timeout_s, work, self._registry)
        except TimeoutError:
            self._went_away(f"no answer within {timeout_s:g} s")
            raise RegistryUnreachableError(f"The registry did not answer within {timeout_s:g} s.") from None
        except UnknownModelError:
            self._came_back()
            raise
        except RegistryError as error:
            self._went_away(str(error))
            raise RegistryUnreachableError(str(error)) from error
        finally:
            self._trying -= 1
        self._came_back()
        return found

    async def revision(self) -> int | None:
        """The registry's revision, read after this call; None if it does not answer at once.

        Requests that arrive during a read share the one after it.
        """
        if self.away:
            return None
        if self._reading is None or self._reading.done():
            task = self._reading = asyncio.create_task(self._revision())
        elif self._next is None:
            task = self._next = asyncio.create_task(self._revision_after(self._reading))
        else:
            task = self._next
        # Shielded: a client that disconnects must not cancel the read that others wait for.
        return await asyncio.shield(task)

    async def _revision(self) -> int | None:
        try:
            return await self.read(_revision_of, REVISION_S)
        except RegistryUnreachableError:
            return None

    async def _revision_after(self, before: asyncio.Task[int | None]) -> int | None:
        await asyncio.wait([before])
        self._reading, self._next = self._next, None
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

    def _went_away(self, reason: str) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
            log.warning("The registry does not answer (%s). Known adapters are served from memory meanwhile.", reason)

    def _came_back(self) -> None:
        if self._away_since is not None:
            log.warning("The registry answers again, after %.0f s.", time.monotonic() - self._away_since)
            self._away_since = None


def _revision_of(registry: Registry) -> int:
    return registry.revision()
