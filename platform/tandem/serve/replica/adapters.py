"""Adapter slots of one engine: adapters are loaded on first use or when pinned, the least recently used are evicted.

Used in the engine's event loop; `Residency` makes the decisions.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Iterable

from tandem.engine.protocol import AdapterRef, Engine
from tandem.errors import AdapterError, EngineError, TandemError
from tandem.serve.replica.adapter_fetches import AdapterFetches
from tandem.serve.replica.residency import Residency, Waiter

REFUSAL_TTL_S = 10.0
"""Seconds for which a refused adapter is refused without trying again: a load pauses every stream for a moment."""


class SlotsBusyError(EngineError):
    """Every adapter slot is in use by running requests."""


class AdapterSlots:
    """The adapters of one engine. An adapter in use is never unloaded."""

    def __init__(
        self,
        engine: Engine,
        capacity: int,
        on_change: Callable[[], None] = lambda: None,
        *,
        cached: int | None = None,
        prepare: Callable[[AdapterRef], AdapterRef] = lambda adapter: adapter,
    ) -> None:
        """`capacity`: slots that one batch can use; `cached`: adapters in the engine's memory (unset: as many).

        `prepare` brings an adapter's files here and checks them, in a thread; it raises AdapterError or StorageError.
        """
        self._engine = engine
        self._residency = Residency(capacity, max(capacity, cached or capacity))
        self._on_change = on_change
        self._fetches = AdapterFetches(prepare)
        self._admissions: dict[Waiter, asyncio.Future[None]] = {}
        self._load_tasks: dict[str, asyncio.Task[None]] = {}
        self._engine_lock = asyncio.Lock()
        self._refusals: dict[str, tuple[float, str]] = {}
        self._pinning_task: asyncio.Task[None] | None = None
        # Replaced whole, as other threads read them.
        self.in_slots: tuple[str, ...] = ()
        """Ids of the adapters in slots, which a batch can use without a copy."""
        self.loads = 0
        """Adapter loads since the start."""
        self.problems: dict[str, str] = {}
        """Pinned adapters that are not loaded, with the reason."""

    @property
    def resident(self) -> tuple[str, ...]:
        """Ids of the adapters in the engine's memory, least recently used first."""
        return tuple(self._residency.loaded)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._residency.waiting)

    def is_ready(self, adapter: AdapterRef) -> bool:
        """Whether `hold` begins at once: the adapter is loaded, and no other request has to end first."""
        return adapter.id in self._residency.loaded and self._residency.admits(adapter.id)

    @contextlib.asynccontextmanager
    async def hold(self, adapter: AdapterRef, wait_s: float = 30.0) -> AsyncIterator[None]:
        """Keep `adapter` loaded for the length of a request.

        Many requests for one adapter load it once. Raises SlotsBusyError if no slot is free within `wait_s`, AdapterError if
        its files cannot be served, and EngineError if the engine is dead.
        """
        if not self._residency.slots:
            raise EngineError(f"This replica takes no adapters, so {adapter.id} cannot be loaded. Raise max_adapters.")
        has_entered = False
        try:
            async with asyncio.timeout(wait_s) as timeout:
                await self._enter(adapter.id)
                has_entered = True
                try:
                    while adapter.id not in self._residency.loaded:
                        await self._load(adapter)
                except BaseException:
                    self._leave(adapter.id)
                    raise
                timeout.reschedule(None)
        except TimeoutError as error:
            reason = f"All {self._residency.slots} adapter slots are in use, and none came free"
            raise SlotsBusyError(
                f"{f'{adapter.id} was not loaded' if has_entered else reason} within {wait_s:.0f} s."
            ) from error
        try:
            yield
        finally:
            self._leave(adapter.id)

    async def load(self, adapter: AdapterRef, wait_s: float = 30.0) -> None:
        """Load an adapter before a request needs it."""
        async with self.hold(adapter, wait_s):
            pass

    async def unload(self, adapter_id: str) -> bool:
        """Unload if it is here; False if a request is using it."""
        async with self._engine_lock:
            if self._residency.users[adapter_id]:
                return False
            if adapter_id in self._residency.loaded:
                await self._evict(adapter_id)
                self._on_change()
            return True

    def set_pinned(self, adapters: Iterable[AdapterRef]) -> None:
        """Replace the pinned adapters: load these as memory allows, and never evict them."""
        pinned = {adapter.id: adapter for adapter in adapters}
        excess = self._residency.pin(pinned)
        capacity_for_pins = max(0, self._residency.cached - 1)
        self.problems = dict.fromkeys(
            excess, f"More is pinned than there is room for: {len(pinned)}, and {capacity_for_pins} can be kept."
        )
        if self._pinning_task is not None:
            self._pinning_task.cancel()
        self._pinning_task = asyncio.create_task(
            self._load_each([pinned[adapter_id] for adapter_id in self._residency.pinned])
        )
        self._admit_waiting()

    async def _load_each(self, adapters: Iterable[AdapterRef]) -> None:
        for adapter in adapters:
            try:
                await self.load(adapter, wait_s=600.0)
            except (TandemError, OSError) as error:
                self.problems = {**self.problems, adapter.id: str(error)}
                self._on_change()

    async def _enter(self, adapter_id: str) -> None:
        waiter = self._residency.arrive(adapter_id)
        if waiter is None:
            return
        admission = self._admissions[waiter] = asyncio.get_running_loop().create_future()
        try:
            await admission
        except BaseException:
            # Admitted at the moment of the cancellation: the slot goes to the next request.
            if admission.done() and not admission.cancelled():
                self._leave(adapter_id)
            raise
        finally:
            self._admissions.pop(waiter, None)
            self._residency.stop_waiting(waiter)
            self._admit_waiting()

    def _leave(self, adapter_id: str) -> None:
        self._residency.leave(adapter_id)
        self.in_slots = self._residency.in_slots
        self._admit_waiting()

    def _admit_waiting(self) -> None:
        for waiter in self._residency.admit():
            self._wake(waiter)

    def _wake(self, waiter: Waiter) -> None:
        admission = self._admissions.get(waiter)
        if admission is None or admission.done():
            self._leave(waiter.adapter)
        else:
            admission.set_result(None)

    async def _load(self, adapter: AdapterRef) -> None:
        refused_until, reason = self._refusals.get(adapter.id, (0.0, ""))
        if time.monotonic() < refused_until:
            raise AdapterError(reason)
        task = self._load_tasks.get(adapter.id)
        if task is None:
            task = self._load_tasks[adapter.id] = asyncio.create_task(self._make_resident(adapter))
            task.add_done_callback(functools.partial(self._load_ended, adapter.id))
        # Shielded: a client that disconnects must not cancel the load that others wait for.
        await asyncio.shield(task)

    def _load_ended(self, adapter_id: str, task: asyncio.Task[None]) -> None:
        self._load_tasks.pop(adapter_id, None)
        if not task.cancelled():
            task.exception()  # retrieved: asyncio reports exceptions of abandoned tasks otherwise

    async def _make_resident(self, adapter: AdapterRef) -> None:
        prepared = await self._fetches.fetch(adapter)
        async with self._engine_lock:
            if (victim := self._residency.eviction_candidate()) is not None:
                await self._evict(victim)
            elif self._residency.full:
                # All requests that waited for this load have gone, and others have taken the memory.
                raise SlotsBusyError(
                    f"All of the engine's memory for adapters is in use, so {adapter.id} cannot be loaded."
                )
            try:
                await self._engine.load_adapter(prepared)
            except EngineError as error:
                if not self._engine.healthy:
                    raise
                self._refuse(adapter.id, str(error))
                raise AdapterError(str(error)) from error
            self._residency.add(adapter.id)
            self.loads += 1
            self.in_slots = self._residency.in_slots
            self.problems = {key: reason for key, reason in self.problems.items() if key != adapter.id}
            self._on_change()

    async def _evict(self, adapter_id: str) -> None:
        self._residency.discard(adapter_id)
        self.in_slots = self._residency.in_slots
        await self._engine.unload_adapter(adapter_id)

    def _refuse(self, adapter_id: str, reason: str) -> None:
        now = time.monotonic()
        self._refusals = {key: refusal for key, refusal in self._refusals.items() if refusal[0] > now}
        self._refusals[adapter_id] = (now + REFUSAL_TTL_S, reason)
