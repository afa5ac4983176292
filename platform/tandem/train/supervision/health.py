"""Worker health: heartbeats of each rank, and detection of hung, failed and slow ranks from them.

A suspended rank sends no heartbeat. Its peers wait for it in a collective, but a separate thread keeps sending their heartbeats,
so the silent rank is the culprit. If every rank is heard and none makes progress, the ranks wait for each other.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tandem.config import FaultsConfig

RATES_KEPT = 16
"""Measurements of a rank's own speed that its mean is taken over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """What is known of a rank by its newest sign of life."""

    rank: int
    node: str
    """Id of its Ray node."""
    pid: int
    process_started_at: float
    """When its process began, by psutil: a pid alone may be another process by now."""
    step: int
    phase: str
    """What it does: start, step, evaluate, save, export, done."""
    data_s: float = 0.0
    """Mean seconds that it waited for rows in a step."""
    compute_s: float = 0.0
    """Mean seconds that a small computation of its own took, which waits for no other rank."""
    stack: str = ""
    """Python stack of its training thread, if the driver requested stacks."""
    stop_reason: str = ""
    """Why it asks that all ranks leave."""
    error: str = ""
    """What it failed with, if it could say so."""
    since_heartbeat_s: float = 0.0
    """Seconds since it was heard."""
    since_progress_s: float = 0.0
    """Seconds since its step or phase changed."""

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Heartbeat:
        """A heartbeat as the mailbox has it."""
        return cls(**{f.name: found[f.name] for f in fields(cls) if f.name in found})


@dataclass(frozen=True, kw_only=True, slots=True)
class Hang:
    """Ranks that will not go on by themselves."""

    ranks: tuple[int, ...]
    why: str


def find_hang(heartbeats: Sequence[Heartbeat], config: FaultsConfig) -> Hang | None:
    """The ranks that have to be ended, or None if all are well."""
    working = [heartbeat for heartbeat in heartbeats if heartbeat.phase != "done"]
    silent = [heartbeat for heartbeat in working if heartbeat.since_heartbeat_s > config.hang_after_s]
    if silent:
        told = ", ".join(f"rank {s.rank} (pid {s.pid}, {s.phase}, step {s.step})" for s in silent)
        longest = max(s.since_heartbeat_s for s in silent)
        return Hang(ranks=tuple(s.rank for s in silent), why=f"{told} gave no sign of life for {longest:.0f} s")
    if working and all(heartbeat.since_progress_s > config.stuck_after_s for heartbeat in working):
        least = min(s.since_progress_s for s in working)
        return Hang(
            ranks=tuple(s.rank for s in working),
            why=f"none of {len(working)} ranks got anything done for {least:.0f} s, in step {min(s.step for s in working)}",
        )
    return None


def find_culprit(failures: Mapping[int, str], died: Sequence[int], heartbeats: Sequence[Heartbeat]) -> tuple[int, str]:
    """The rank that is behind a failure, and what to say of it. `failures`: Ray Train's word of ranks, of which some `died`.

    A rank that loses a peer fails as well, and is often heard first. The one that is to blame said nothing, or spoke first.
    """
    told = sorted(
        (heartbeat for heartbeat in heartbeats if heartbeat.error), key=lambda heartbeat: -heartbeat.since_heartbeat_s
    )
    mute = [heartbeat for heartbeat in heartbeats if heartbeat.phase != "done"]
    if died:
        return died[0], failures[died[0]]
    if told and mute:
        return mute[0].rank, (
            f"its process ({mute[0].pid}) ended without a word, after its sign of life in step {mute[0].step}; worker "
            f"{told[0].rank} said: {told[0].error}"
        )
    if told:
        return told[0].rank, told[0].error
    return min(failures), failures[min(failures)]


def find_slow_ranks(heartbeats: Sequence[Heartbeat], factor: float) -> dict[int, str]:
    """Ranks that need more than `factor` times what the middle one needs, and for what."""
    found: dict[int, str] = {}
    for what, said, least_s in (("compute_s", "to compute the same", 0.0), ("data_s", "for its rows", 0.05)):
        each = {heartbeat.rank: float(getattr(heartbeat, what)) for heartbeat in heartbeats}
        if len(each) < 2 or min(each.values()) < 0 or not all(each.values()):
            continue
        for rank, took in each.items():
            # Against the others, not against itself: of two ranks the middle would be between them.
            middle = statistics.median(value for other, value in each.items() if other != rank)
            if took > factor * middle and took > least_s:
                found.setdefault(
                    rank, f"{1000 * took:.1f} ms {said}, {took / middle:.1f} times the other ranks' {1000 * middle:.1f}"
                )
    return found


class HeartbeatThread(threading.Thread):
    """Gives a rank's signs of life, from its start to `close`; `order` is what the driver wants, as it was heard last."""

    def __init__(self, mailbox: Any, *, rank: int, node: str, every_s: float) -> None:
        import os

        import psutil

        super().__init__(name="heartbeat_thread", daemon=True)
        self.order: Mapping[str, Any] = {}
        self.rank = rank
        self._mailbox, self._every_s = mailbox, every_s
        self._about = {
            "rank": rank,
            "node": node,
            "pid": os.getpid(),
            "process_started_at": psutil.Process().create_time(),
        }
        self._step, self._phase = 0, "start"
        self._data: deque[float] = deque(maxlen=RATES_KEPT)
        self._compute: deque[float] = deque(maxlen=RATES_KEPT)
        self._trained_by = threading.get_ident()
        self._over = threading.Event()
        self.stop_reason = ""
        """Set by whoever ends this process: a signal's handler may do no more."""
        self.error = ""
        """Set when training failed."""

    def run(self) -> None:
        """See `Thread`."""
        import ray
        import ray.exceptions

        while True:
            last = self._over.is_set()
            try:
                self.order = ray.get(self._mailbox.beat.remote(self.heartbeat()))
            except ray.exceptions.RayError:
                # Without the driver's mailbox there is nobody to hear; Ray ends workers whose driver is gone.
                return
            if last:
                return
            self._over.wait(self._every_s)

    def heartbeat(self) -> dict[str, Any]:
        """The heartbeat to give now."""
        return {
            **self._about,
            "step": self._step,
            "phase": self._phase,
            "data_s": _mean(self._data),
            "compute_s": _mean(self._compute),
            "stack": self.stack() if self.order.get("stacks") else "",
            "stop_reason": self.stop_reason,
            "error": self.error,
        }

    def enter_phase(self, phase: str, step: int) -> None:
        """The rank has come to this."""
        self._phase, self._step = phase, step

    def record(self, *, data_s: float | None = None, compute_s: float | None = None) -> None:
        """What the rank took by itself."""
        if data_s is not None:
            self._data.append(data_s)
        if compute_s is not None:
            self._compute.append(compute_s)

    def stack(self) -> str:
        """Where the thread that trains is."""
        frame = sys._current_frames().get(self._trained_by)
        return "".join(traceback.format_stack(frame)) if frame else ""

    def close(self) -> None:
        """Give a last heartbeat, that of a rank that is done, and end."""
        self._phase = "done"
        self._over.set()
        self.join(timeout=5 * self._every_s)


class SpeedProbe:
    """Times a small computation that waits for nobody, on the device that trains, now and then."""

    def __init__(self, device: Any, every_s: float) -> None:
        import torch

        self._device, self._every_s, self._next = device, every_s, 0.0
        size = 192 if device.type == "cpu" else 2048
        self._matrix = torch.ones(size, size, device=device) / size
        self._events: tuple[Any, Any] | None = None

    def __call__(self) -> float | None:
        """Seconds that it took, if it is time; of a GPU those of the time before, since nothing waits for it."""
        import torch

        if time.monotonic() < self._next:
            return None
        self._next = time.monotonic() + self._every_s
        if self._device.type == "cpu":
            began = time.perf_counter()
            self._compute()
            return time.perf_counter() - began
        took = None
        if self._events is not None and self._events[1].query():
            took = float(self._events[0].elapsed_time(self._events[1])) / 1000
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        self._compute()
        last.record()
        self._events = (first, last)
        return took

    def _compute(self) -> None:
        found = self._matrix
        for _ in range(8):
            found = found @ self._matrix


def _mean(values: deque[float]) -> float:
    # It is appended to while it is read.
    kept = list(values)
    return sum(kept) / len(kept) if len(kept) >= RATES_KEPT // 2 else 0.0
