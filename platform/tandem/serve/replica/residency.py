"""Adapter residency of one engine: requests wait here for a slot, and adapters are chosen for eviction. Pure; callers act.

An engine has `slots` for adapters that a batch uses, and memory for `cached` adapters (at least as many). vLLM moves adapters
between the two by itself, least recently used first. It must get no batch that needs more adapters than it has slots, and no
adapter may leave its memory while a request needs it: vLLM would read the files again in the middle of a step, and a step that
fails ends the engine.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

MAX_OVERTAKEN = 32
"""Requests that may overtake one that waits for a slot; then all wait until it has one."""


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that waits for a slot."""

    adapter: str
    overtaken_by: int = 0
    """Requests that arrived later and were admitted first."""


@dataclass(slots=True)
class Residency:
    """State of one engine's adapters, by id."""

    slots: int
    cached: int
    loaded: OrderedDict[str, None] = field(default_factory=OrderedDict)
    """Adapters in the engine's memory, least recently used first."""
    users: Counter[str] = field(default_factory=Counter)
    """Number of requests that hold each adapter; it may still be loading."""
    pinned: tuple[str, ...] = ()
    """Adapters that are never evicted: at most `cached - 1`, so that one other always fits."""
    waiting: deque[Waiter] = field(default_factory=deque)
    """In order of arrival."""

    def arrive(self, adapter: str) -> Waiter | None:
        """A request arrives: None if it is admitted at once and counts as a user, else its entry in the queue."""
        if self.admits(adapter):
            if self.waiting:
                self.waiting[0].overtaken_by += 1
            self.users[adapter] += 1
            return None
        waiter = Waiter(adapter)
        self.waiting.append(waiter)
        return waiter

    def admits(self, adapter: str) -> bool:
        """Whether a request that arrives now is admitted at once."""
        return self._fits(adapter) and (not self.waiting or self.waiting[0].overtaken_by < MAX_OVERTAKEN)

    def admit(self) -> list[Waiter]:
        """Remove and return the requests that are admitted now and count as users; call it when a request has left."""
        admitted: list[Waiter] = []
        first_waiting: Waiter | None = None
        for waiter in list(self.waiting):
            if first_waiting is not None and first_waiting.overtaken_by >= MAX_OVERTAKEN:
                break
            if self._fits(waiter.adapter):
                if first_waiting is not None:
                    first_waiting.overtaken_by += 1
                self.users[waiter.adapter] += 1
                self.waiting.remove(waiter)
                admitted.append(waiter)
            else:
                first_waiting = first_waiting or waiter
        return admitted

    def leave(self, adapter: str) -> None:
        """A request that counts as a user has ended."""
        self.users[adapter] -= 1
        if not self.users[adapter]:
            del self.users[adapter]
        self._touch(adapter)

    def stop_waiting(self, waiter: Waiter) -> None:
        """A request has stopped waiting."""
        if waiter in self.waiting:
            self.waiting.remove(waiter)

    def eviction_candidate(self) -> str | None:
        """The adapter to evict before another is loaded; None if memory is free.

        There is always one where a request was admitted: users and pins together leave one place.
        """
        if len(self.loaded) < self.cached:
            return None
        return next(
            (adapter for adapter in self.loaded if adapter not in self.users and adapter not in self.pinned), None
        )

    @property
    def full(self) -> bool:
        """Whether no adapter can be loaded, even with an eviction."""
        return len(self.loaded) >= self.cached and self.eviction_candidate() is None

    def add(self, adapter: str) -> None:
        """An adapter has been loaded."""
        self._touch(adapter, new=True)

    def discard(self, adapter: str) -> None:
        """An adapter has been evicted."""
        self.loaded.pop(adapter, None)

    def pin(self, adapters: Iterable[str]) -> tuple[str, ...]:
        """Replace the pinned adapters; returns those that do not fit."""
        adapters_in_order = tuple(dict.fromkeys(adapters))
        self.pinned = adapters_in_order[: max(0, self.cached - 1)]
        return adapters_in_order[len(self.pinned) :]

    @property
    def in_slots(self) -> tuple[str, ...]:
        """Adapters in the engine's slots: the most recently used."""
        busy = [adapter for adapter in self.loaded if adapter in self.users]
        idle = [adapter for adapter in self.loaded if adapter not in self.users]
        return tuple([*idle, *busy][-self.slots :]) if self.slots else ()

    def _fits(self, adapter: str) -> bool:
        if adapter in self.users:
            return True
        return len(self.users) < self.slots and len({*self.users, *self.pinned, adapter}) <= self.cached

    def _touch(self, adapter: str, *, new: bool = False) -> None:
        if new or adapter in self.loaded:
            self.loaded[adapter] = None
            self.loaded.move_to_end(adapter)
