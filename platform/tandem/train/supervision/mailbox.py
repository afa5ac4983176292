"""Where workers leave events and signs of life for the driver, and find what it wants of them.

It is a small actor of the driver's, on the driver's node, and outlives any worker.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class Mailbox:
    """Events in the order they came, the newest sign of life of each rank, and the fault that ends the run, if there is one."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._fault: tuple[str, str, int] | None = None
        self._arrived = asyncio.Event()
        self._heartbeats: dict[int, dict[str, Any]] = {}
        self._heard: dict[int, float] = {}
        self._moved: dict[int, float] = {}
        self._order: dict[str, Any] = {}

    async def put(self, event: dict[str, Any]) -> None:
        """Leave an event."""
        self._events.append(event)
        self._arrived.set()

    async def report_fatal(self, kind: str, message: str, exit_code: int) -> None:
        """Leave the fault that another try would meet again; the first one counts."""
        self._fault = self._fault or (kind, message, exit_code)

    async def fatal_error(self) -> tuple[str, str, int] | None:
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

    async def heartbeat(self, heartbeat: dict[str, Any]) -> dict[str, Any]:
        """A rank lives (see `tandem.train.supervision.health.Heartbeat`); returns what the driver wants of the workers."""
        rank, now = heartbeat["rank"], time.monotonic()
        before = self._heartbeats.get(rank, {})
        if (before.get("step"), before.get("phase")) != (heartbeat["step"], heartbeat["phase"]):
            self._moved[rank] = now
        self._heartbeats[rank], self._heard[rank] = heartbeat, now
        return self._order

    async def heartbeats(self) -> list[dict[str, Any]]:
        """The newest sign of life of each rank, with the seconds since it came and since the rank got anything done."""
        now = time.monotonic()
        return [
            {**heartbeat, "since_heartbeat_s": now - self._heard[rank], "since_progress_s": now - self._moved[rank]}
            for rank, heartbeat in sorted(self._heartbeats.items())
        ]

    async def command(self, order: dict[str, Any]) -> None:
        """Tell the workers, with their next sign of life, what is wanted of them."""
        self._order = {**self._order, **order}


def open_mailbox() -> Any:
    """A mailbox beside the driver; it goes when the driver goes."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Mailbox).options(num_cpus=0, max_concurrency=64, scheduling_strategy=here).remote()
