"""List of the adapters of served models, in memory: pages cost no query, however many adapters there are.

It is read again after a change of the registry, in a thread of its own, never more than a tenth of the time.
"""

from __future__ import annotations

import asyncio
import bisect
import heapq
import itertools
import operator
import time
from collections.abc import Awaitable, Callable, Collection, Iterable

from tandem.errors import RegistryUnreachableError
from tandem.gateway.models.registry_reads import RegistryReads
from tandem.registry.records import AdapterSummary

PAGE = 2000
"""Adapters of one query."""
PAGE_S = 5.0
"""Seconds that one query may take."""
WAIT_S = 1.0
"""Seconds that a request waits for a new read of the list after a change; then it gets the previous list."""
PAUSE_FACTOR = 10
"""Pause after a reading, in multiples of the time that it took."""
NO_PAUSE_BELOW_S = 0.05
"""Readings that take less need no pause."""
NUM_NEIGHBOURS = 100
"""Names on either side of a wrong one, by the alphabet, among which the nearest is sought."""


NAME = operator.attrgetter("name")


class AdapterList:
    """The promoted adapters of some bases that can be served, by name."""

    def __init__(
        self,
        reads: RegistryReads,
        bases: Iterable[str],
        revision: Callable[[], Awaitable[int | None]],
        hidden: Collection[str],
    ) -> None:
        """`revision` reads the registry's revision; `hidden`: names that mean something else here."""
        self._reads = reads
        self._bases = tuple(bases)
        self._current_revision = revision
        self._hidden = frozenset(hidden)
        self._adapters: list[AdapterSummary] = []
        """All of them, by name."""
        self._by_tenant: dict[str | None, list[AdapterSummary]] = {}
        """Those of each tenant, by name; None: shared ones. So a tenant's list takes no time for other tenants' adapters."""
        self._revision: int | None = None
        self._refresh_task: asyncio.Task[None] | None = None
        self._next_refresh_at = 0.0

    async def page(self, after: str | None, limit: int, tenant: str | None = None) -> tuple[list[AdapterSummary], bool]:
        """At most `limit` adapters after the name `after`, and whether there are more.

        `tenant`: its own and the shared ones only; None: all. RegistryUnreachableError if the registry does not answer and has
        never been read.
        """
        await self._refresh_if_changed()
        sorted_lists = []
        for adapters in self._visible(tenant):
            start = 0 if after is None else bisect.bisect_right(adapters, after, key=NAME)
            sorted_lists.append(adapters[start : start + limit + 1])
        matching_adapters = list(itertools.islice(heapq.merge(*sorted_lists, key=NAME), limit + 1))
        return matching_adapters[:limit], len(matching_adapters) > limit

    def near(self, name: str, tenant: str | None = None) -> list[str]:
        """The `NUM_NEIGHBOURS` names before and after `name` in the alphabet; `tenant` as in `page`."""
        names: list[str] = []
        for adapters in self._visible(tenant):
            position = bisect.bisect_left(adapters, name, key=NAME)
            names += (
                adapter.name for adapter in adapters[max(0, position - NUM_NEIGHBOURS) : position + NUM_NEIGHBOURS]
            )
        return sorted(names)

    def _visible(self, tenant: str | None) -> list[list[AdapterSummary]]:
        if tenant is None:
            return [self._adapters]
        return [self._by_tenant.get(owner, []) for owner in (None, tenant)]

    def changed(self, revision: int) -> None:
        """The registry is at `revision`: read it again in the background, if this list is in use."""
        if self._revision not in (None, revision):
            self._refresh()

    async def _refresh_if_changed(self) -> None:
        revision = await self._current_revision()
        # The first reading that is waited for may have begun before the change that is asked for; the second has not.
        for _ in range(2):
            loaded = self._revision is not None
            if loaded and revision in (None, self._revision):
                return
            task = self._refresh()
            if task is None:
                return
            done, _pending = await asyncio.wait([task], timeout=WAIT_S if loaded else None)
            if not loaded and done:
                task.result()

    def _refresh(self) -> asyncio.Task[None] | None:
        """The reading under way, or a new one; None: it is too early for one."""
        if self._refresh_task is not None:
            return self._refresh_task
        if self._revision is not None and time.monotonic() < self._next_refresh_at:
            return None
        task = self._refresh_task = asyncio.create_task(self._read())
        task.add_done_callback(self._read_ended)
        return task

    def _read_ended(self, task: asyncio.Task[None]) -> None:
        self._refresh_task = None
        if not task.cancelled():
            task.exception()  # retrieved: those who wait for it raise it

    async def _read(self) -> None:
        started_at = time.monotonic()
        # Read before the adapters: a change in between is read the next time.
        revision = await self._current_revision()
        if revision is None:
            raise RegistryUnreachableError("The registry does not answer.")
        all_adapters: list[AdapterSummary] = []
        by_tenant: dict[str | None, list[AdapterSummary]] = {}
        for base in self._bases:
            after = ""
            while True:
                page = await self._reads.read(_page_of(base, after), PAGE_S)
                servable = [adapter for adapter in page if not adapter.dora and adapter.name not in self._hidden]
                all_adapters += servable
                for adapter in servable:
                    by_tenant.setdefault(adapter.tenant, []).append(adapter)
                if len(page) < PAGE:
                    break
                after = page[-1].name
        for adapters in (all_adapters, *by_tenant.values()):
            adapters.sort(key=NAME)
        self._adapters, self._by_tenant, self._revision = all_adapters, by_tenant, revision
        took_s = time.monotonic() - started_at
        self._next_refresh_at = time.monotonic() + (PAUSE_FACTOR * took_s if took_s > NO_PAUSE_BELOW_S else 0.0)


def _page_of(base: str, after: str) -> Callable[..., list[AdapterSummary]]:
    return lambda registry: registry.summaries(base, after=after, limit=PAGE)
