"""Request to stop a job, set by a signal handler and read by the driver."""

from __future__ import annotations

import os
import signal
import threading


class StopRequest:
    """Whether the job was told to stop. True in a condition once it is set."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.training = False
        """Whether there are workers that could save a last checkpoint."""
        self.overdue = False
        """Whether they have had the time that `faults.leave_s` gives them."""

    def set(self) -> None:
        """Request the stop. Safe in a signal handler."""
        self._event.set()

    def __bool__(self) -> bool:
        return self._event.is_set()

    def interrupt(self) -> None:
        """End the main thread's wait for workers that do not stop, with the signal that requested the stop."""
        self.overdue = True
        os.kill(os.getpid(), signal.SIGTERM)
