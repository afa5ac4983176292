"""Mailbox between workers and driver: an actor that takes events and heartbeats, and hands out commands.

It runs on the driver's node and outlives any worker; each attempt has its own.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tandem.observability.events import Event
from tandem.train.supervision.commands import Command, StandingCommands
from tandem.train.supervision.heartbeat import Heartbeat
from tandem.train.supervision.outcome import Refused


class Mailbox:
    """Events in the order of arrival, the newest heartbeat of each rank, the standing commands, and the fatal error if any."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._num_received = 0
        """Number of events that arrived."""
        self._num_recorded = 0
        """Number of events that the driver has recorded."""
        self._num_taken = 0
        """Number of events that the driver has taken."""
        self._progress = asyncio.Condition()
        self._fatal: Refused | None = None
        self._arrived = asyncio.Event()
        self._heartbeats: dict[int, Heartbeat] = {}
        self._heartbeat_at: dict[int, float] = {}
        self._progressed_at: dict[int, float] = {}
        self._commands = StandingCommands()

    async def put(self, event: Event) -> None:
        """Append an event."""
        self._events.append(event)
        self._num_received += 1
        self._arrived.set()

    async def report_fatal(self, error: Refused) -> None:
        """Record an error that another attempt would meet again; the first one counts."""
        self._fatal = self._fatal or error

    async def fatal_error(self) -> Refused | None:
        """The first error that was reported as fatal."""
        return self._fatal

    async def flush(self) -> None:
        """Returns after everything that the caller sent before has arrived."""

    async def recorded(self) -> None:
        """Returns once the driver has recorded everything that the caller sent before.

        A checkpoint is written after that: where the driver is killed, a run that resumes from the checkpoint does not report
        the steps before it again.
        """
        last = self._num_received
        async with self._progress:
            await self._progress.wait_for(lambda: self._num_recorded >= last)

    async def take(self, timeout_s: float) -> list[Event]:
        """Remove and return all events; waits up to `timeout_s` if there are none. Those taken before count as recorded."""
        if self._num_recorded < self._num_taken:
            self._num_recorded = self._num_taken
            async with self._progress:
                self._progress.notify_all()
        try:
            await asyncio.wait_for(self._arrived.wait(), timeout_s)
        except TimeoutError:
            return []
        events, self._events = self._events, []
        self._num_taken += len(events)
        self._arrived.clear()
        return events

    async def heartbeat(self, heartbeat: Heartbeat) -> StandingCommands:
        """Record a rank's heartbeat; returns the standing commands."""
        rank, now = heartbeat.rank, time.monotonic()
        previous = self._heartbeats.get(rank)
        if previous is None or (previous.step, previous.phase) != (heartbeat.step, heartbeat.phase):
            self._progressed_at[rank] = now
        self._heartbeats[rank], self._heartbeat_at[rank] = heartbeat, now
        return self._commands

    async def heartbeats(self) -> list[Heartbeat]:
        """The newest heartbeat of each rank, with the seconds since it arrived and since the rank made progress."""
        now = time.monotonic()
        return [
            replace(
                heartbeat,
                since_heartbeat_s=now - self._heartbeat_at[rank],
                since_progress_s=now - self._progressed_at[rank],
            )
            for rank, heartbeat in sorted(self._heartbeats.items())
        ]

    async def command(self, command: Command) -> None:
        """Add a command to those that workers get in reply to their heartbeats."""
        self._commands = self._commands.with_command(command)


def open_mailbox() -> Any:
    """Start a mailbox actor on the driver's node; it ends with the driver."""
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Mailbox).options(num_cpus=0, max_concurrency=64, scheduling_strategy=this_node).remote()
