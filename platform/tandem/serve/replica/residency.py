"""Which adapters one engine holds, and who may come next. Pure: requests come and go, loads begin and end; callers act.

An engine has `slots` places that a batch can use and memory for `cached` adapters (at least as many). vLLM moves adapters between
the two by itself, the longest unused first; what it must be spared is a batch that needs more adapters than it has slots, and an
adapter that leaves its memory while a request needs it: it would read the files again in the middle of a step, and a step that
fails is an engine's death. So it is here that requests wait for a slot and that adapters are sent away.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

MAX_OVERTAKEN = 32
"""Requests that may pass one that waits for a slot; then all wait until it has one."""


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that waits for a slot."""

    adapter: str
    overtaken_by: int = 0
    """Requests that came later and went first."""


@dataclass(slots=True)
class Residency:
    """The books of one engine. An adapter is named by its id."""

    slots: int
    cached: int
    loaded: OrderedDict[str, None] = field(default_factory=OrderedDict)
    """In the engine's memory, the longest unused first."""
    users: Counter[str] = field(default_factory=Counter)
    """Requests by the adapter that they hold; it may still be on its way into memory."""
    pinned: tuple[str, ...] = ()
    """Never sent away. Room for one other always stays: of more than `cached - 1` pins the rest is not kept."""
    waiting: deque[Waiter] = field(default_factory=deque)
    """In the order of their coming."""

    def arrive(self, adapter: str) -> Waiter | None:
        """A request comes: None if it may go on at once (then it counts as a user), else its place in the queue."""
        first = self.waiting[0] if self.waiting else None
        if self._fits(adapter) and (first is None or first.overtaken_by < MAX_OVERTAKEN):
            if first is not None:
                first.overtaken_by += 1
            self.users[adapter] += 1
            return None
        waiter = Waiter(adapter)
        self.waiting.append(waiter)
        return waiter

    def admit(self) -> list[Waiter]:
        """Those who may go on now: they left the queue and count as users. Call it when a request has left."""
        admitted: list[Waiter] = []
        ahead: Waiter | None = None
        for waiter in list(self.waiting):
            if ahead is not None and ahead.overtaken_by >= MAX_OVERTAKEN:
                break
            if self._fits(waiter.adapter):
                if ahead is not None:
                    ahead.overtaken_by += 1
                self.users[waiter.adapter] += 1
                self.waiting.remove(waiter)
                admitted.append(waiter)
            else:
                ahead = ahead or waiter
        return admitted

    def leave(self, adapter: str) -> None:
        """A request that counted as a user has ended."""
        self.users[adapter] -= 1
        if not self.users[adapter]:
            del self.users[adapter]
        self._touch(adapter)

    def stop_waiting(self, waiter: Waiter) -> None:
        """A request waits no longer."""
        if waiter in self.waiting:
            self.waiting.remove(waiter)

    def eviction_candidate(self) -> str | None:
        """The adapter that must go before another is loaded; None if there is room.

        There is always one where a request was let in: users and pins together leave a place.
        """
        if len(self.loaded) < self.cached:
            return None
        return next((each for each in self.loaded if each not in self.users and each not in self.pinned), None)

    @property
    def full(self) -> bool:
        """Whether nothing can be loaded even by sending something away."""
        return len(self.loaded) >= self.cached and self.eviction_candidate() is None

    def add(self, adapter: str) -> None:
        """An adapter is in memory."""
        self._touch(adapter, new=True)

    def discard(self, adapter: str) -> None:
        """An adapter is in memory no more."""
        self.loaded.pop(adapter, None)

    def pin(self, adapters: Iterable[str]) -> tuple[str, ...]:
        """Keep these, and no others; those for which there is no room."""
        wanted = tuple(dict.fromkeys(adapters))
        self.pinned = wanted[: max(0, self.cached - 1)]
        return wanted[len(self.pinned) :]

    @property
    def in_slots(self) -> tuple[str, ...]:
        """Those that lie in the engine's slots, as it moves them: the ones used last."""
        busy = [each for each in self.loaded if each in self.users]
        idle = [each for each in self.loaded if each not in self.users]
        return tuple([*idle, *busy][-self.slots :]) if self.slots else ()

    def _fits(self, adapter: str) -> bool:
        if adapter in self.users:
            return True
        return len(self.users) < self.slots and len({*self.users, *self.pinned, adapter}) <= self.cached

    def _touch(self, adapter: str, *, new: bool = False) -> None:
        if new or adapter in self.loaded:
            self.loaded[adapter] = None
            self.loaded.move_to_end(adapter)
