"""Heartbeats of training workers: the state that each rank reports, and the thread that sends it."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass
from typing import Any

from tandem.train.supervision.commands import StandingCommands

WINDOW_SIZE = 16
"""Measurements that the means in a heartbeat are taken over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """State of one rank. The mailbox adds the ages."""

    rank: int
    node: str
    """Id of its Ray node."""
    pid: int
    process_started_at: float
    """As psutil gives it: a pid may be reused by another process."""
    step: int
    phase: str
    """start, step, evaluate, save, export or done."""
    data_s: float = 0.0
    """Mean seconds that it waited for the rows of a step."""
    compute_s: float = 0.0
    """Mean seconds of a small computation that waits for no other rank (see `SpeedProbe`)."""
    stack: str = ""
    """Python stack of its training thread, if the driver requested stacks."""
    stop_reason: str = ""
    """Why it requests that all ranks stop."""
    error: str = ""
    """The exception that ended its training."""
    since_heartbeat_s: float = 0.0
    """Seconds since this heartbeat arrived."""
    since_progress_s: float = 0.0
    """Seconds since the rank's step or phase changed."""


class HeartbeatThread(threading.Thread):
    """Sends a rank's heartbeat every `every_s` seconds until `close`; `commands` are the driver's, as of the last reply."""

    def __init__(self, mailbox: Any, *, rank: int, node: str, every_s: float) -> None:
        import psutil

        super().__init__(name="heartbeat", daemon=True)
        self.commands = StandingCommands()
        self.rank = rank
        self._mailbox, self._every_s = mailbox, every_s
        self._node, self._process_started_at = node, psutil.Process().create_time()
        self._step, self._phase = 0, "start"
        self._data: deque[float] = deque(maxlen=WINDOW_SIZE)
        self._compute: deque[float] = deque(maxlen=WINDOW_SIZE)
        self._training_thread = threading.get_ident()
        self._ended = threading.Event()
        self.stop_reason = ""
        """Set by a signal handler, which may do no more than that."""
        self.error = ""
        """Set when training failed."""

    def run(self) -> None:
        """See `Thread`."""
        import ray
        import ray.exceptions

        while True:
            last = self._ended.is_set()
            try:
                self.commands = ray.get(self._mailbox.heartbeat.remote(self.heartbeat()))
            except ray.exceptions.RayError:
                # The mailbox ends with the driver, and Ray ends workers whose driver is gone.
                return
            if last:
                return
            self._ended.wait(self._every_s)

    def heartbeat(self) -> Heartbeat:
        """The current heartbeat."""
        return Heartbeat(
            rank=self.rank,
            node=self._node,
            pid=os.getpid(),
            process_started_at=self._process_started_at,
            step=self._step,
            phase=self._phase,
            data_s=_mean(self._data),
            compute_s=_mean(self._compute),
            stack=self.stack() if self.commands.dump_stacks else "",
            stop_reason=self.stop_reason,
            error=self.error,
        )

    def enter_phase(self, phase: str, step: int) -> None:
        """The rank begins a phase of a step."""
        self._phase, self._step = phase, step

    def record(self, *, data_s: float | None = None, compute_s: float | None = None) -> None:
        """Add measurements in seconds."""
        if data_s is not None:
            self._data.append(data_s)
        if compute_s is not None:
            self._compute.append(compute_s)

    def stack(self) -> str:
        """Python stack of the thread that made this object, which is the one that trains."""
        frame = sys._current_frames().get(self._training_thread)
        return "".join(traceback.format_stack(frame)) if frame else ""

    def close(self) -> None:
        """Send a last heartbeat with the phase `done`, and end."""
        self._phase = "done"
        self._ended.set()
        self.join(timeout=5 * self._every_s)


class SpeedProbe:
    """Times a small matrix product on the training device, at most every `every_s` seconds; it waits for no other rank."""

    def __init__(self, device: Any, every_s: float) -> None:
        import torch

        self._device, self._every_s, self._next = device, every_s, 0.0
        size = 192 if device.type == "cpu" else 2048
        self._matrix = torch.ones(size, size, device=device) / size
        self._events: tuple[Any, Any] | None = None

    def __call__(self) -> float | None:
        """Seconds of the product, or None if it is not due. On a GPU the result of the call before: nothing waits for it."""
        import torch

        if time.monotonic() < self._next:
            return None
        self._next = time.monotonic() + self._every_s
        if self._device.type == "cpu":
            start_time = time.perf_counter()
            self._compute()
            return time.perf_counter() - start_time
        seconds = None
        if self._events is not None and self._events[1].query():
            seconds = float(self._events[0].elapsed_time(self._events[1])) / 1000
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        self._compute()
        last.record()
        self._events = (first, last)
        return seconds

    def _compute(self) -> None:
        product = self._matrix
        for _ in range(8):
            product = product @ self._matrix


def _mean(values: deque[float]) -> float:
    # The training thread appends while this thread reads.
    snapshot = list(values)
    return sum(snapshot) / len(snapshot) if len(snapshot) >= WINDOW_SIZE // 2 else 0.0
