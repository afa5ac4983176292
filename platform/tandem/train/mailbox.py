"""Where workers leave events for the driver: a small actor of the driver's, which outlives any worker."""

from __future__ import annotations

import asyncio
from typing import Any

import ray


class Mailbox:
    """Events in the order they came, and the fault that ends the run, if there is one."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._fault: tuple[str, str, int] | None = None
        self._arrived = asyncio.Event()

    async def put(self, event: dict[str, Any]) -> None:
        """Leave an event."""
        self._events.append(event)
        self._arrived.set()

    async def fail(self, kind: str, message: str, exit_code: int) -> None:
        """Leave the fault that another try would meet again; the first one counts."""
        self._fault = self._fault or (kind, message, exit_code)

    async def failed(self) -> tuple[str, str, int] | None:
        """That fault: its error's class, text and exit status."""
        return self._fault

    async def flush(self) -> None:
        """Returns once everything that the caller sent before has been taken in."""

    async def take(self, timeout_s: float) -> list[dict[str, Any]]:
        """All events not yet taken, at once if there are any, else what comes within `timeout_s`."""
        try:
            await asyncio.wait_for(self._arrived.wait(), timeout_s)
        except TimeoutError:
            return []
        taken, self._events = self._events, []
        self._arrived.clear()
        return taken


def open_mailbox() -> Any:
    """A mailbox near the driver; it goes when the driver goes."""
    return ray.remote(Mailbox).options(num_cpus=0, max_concurrency=64).remote()
