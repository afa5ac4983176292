"""Which adapters one engine holds: loaded when first asked for, the longest unused one unloaded when slots run out."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable

from tandem.engine.protocol import AdapterRef, Engine
from tandem.errors import EngineError


class SlotsBusyError(EngineError):
    """Every adapter slot is in use by running requests."""


class AdapterSlots:
    """The adapters of one engine. Lives in the engine's event loop; an adapter in use is never unloaded."""

    def __init__(self, engine: Engine, capacity: int, on_change: Callable[[], None] = lambda: None) -> None:
        self._engine = engine
        self._capacity = capacity
        self._on_change = on_change
        self._resident: OrderedDict[str, AdapterRef] = OrderedDict()
        self._users: Counter[str] = Counter()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @property
    def resident(self) -> tuple[str, ...]:
        """Ids, the longest unused first."""
        return tuple(self._resident)

    @contextlib.asynccontextmanager
    async def hold(self, adapter: AdapterRef, wait_s: float = 30.0) -> AsyncIterator[None]:
        """Keep `adapter` loaded for the length of a request.

        Many requests for one adapter load it once. Raises SlotsBusyError if no slot is free within `wait_s`, and
        EngineError if the engine cannot load it.
        """
        if adapter.id not in self._resident:
            await self._load(adapter, wait_s)
        # No await between the check above and the count below: the adapter cannot go in between.
        self._resident.move_to_end(adapter.id)
        self._users[adapter.id] += 1
        try:
            yield
        finally:
            self._users[adapter.id] -= 1
            if not self._users[adapter.id]:
                del self._users[adapter.id]
                self._freed.set()

    async def load(self, adapter: AdapterRef, wait_s: float = 30.0) -> None:
        """Load ahead of need."""
        async with self.hold(adapter, wait_s):
            pass

    async def unload(self, adapter_id: str) -> bool:
        """Unload if it is here; False if a request is using it."""
        async with self._turn:
            if self._users[adapter_id]:
                return False
            if self._resident.pop(adapter_id, None) is not None:
                await self._engine.unload_adapter(adapter_id)
                self._freed.set()
                self._on_change()
            return True

    async def _load(self, adapter: AdapterRef, wait_s: float) -> None:
        if not self._capacity:
            raise EngineError(f"This replica takes no adapters, so {adapter.id} cannot be loaded. Raise max_adapters.")
        try:
            async with asyncio.timeout(wait_s):
                while adapter.id not in self._resident:
                    task = self._loading.get(adapter.id)
                    if task is None:
                        task = self._loading[adapter.id] = asyncio.create_task(self._make_resident(adapter))
                        task.add_done_callback(functools.partial(self._loaded, adapter.id))
                    # Shielded: a client that leaves must not cancel the load that others wait for.
                    await asyncio.shield(task)
        except TimeoutError as error:
            raise SlotsBusyError(
                f"All {self._capacity} adapter slots are in use, and none came free within {wait_s:.0f} s."
            ) from error

    def _loaded(self, adapter_id: str, task: asyncio.Task[None]) -> None:
        self._loading.pop(adapter_id, None)
        if not task.cancelled():
            task.exception()  # seen here, so that a load nobody waits for any more does not complain at exit

    async def _make_resident(self, adapter: AdapterRef) -> None:
        while not await self._try_to_load(adapter):
            await self._freed.wait()

    async def _try_to_load(self, adapter: AdapterRef) -> bool:
        """Load into a free slot, or one whose adapter nobody uses; False if there is none."""
        async with self._turn:
            while len(self._resident) >= self._capacity:
                victim = next((name for name in self._resident if not self._users[name]), None)
                if victim is None:
                    self._freed.clear()
                    return False
                del self._resident[victim]
                await self._engine.unload_adapter(victim)
            await self._engine.load_adapter(adapter)
            self._resident[adapter.id] = adapter
            self._on_change()
            return True
