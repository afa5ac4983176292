"""Recorder of worker events: writes them to the journal and the metric sinks, and derives restarts and resizes from starts."""

from __future__ import annotations

import time

from tandem.observability.events import Event, Resized, Restarted, Started, Step
from tandem.observability.journal import Journal
from tandem.train.reporting.metrics import Metrics


class EventRecorder:
    """Records the events of all attempts of one driver."""

    def __init__(self, journal: Journal, metrics: Metrics) -> None:
        self.journal, self.metrics = journal, metrics
        self.starts = 0
        """Attempts that began to train."""
        self.last_step = 0
        """Last step that was reported."""
        self.restart_reason = ""
        """Why the last attempt ended."""
        self._stepped_at: float | None = None
        self._workers: int | None = None

    def record(self, event: Event) -> None:
        """Write an event that a worker sent."""
        if isinstance(event, Started):
            self._record_start(event)
            return
        if isinstance(event, Step):
            self.last_step, self._stepped_at = event.step, time.monotonic()
        self.journal.write(event)
        self.metrics.write(event)

    def _record_start(self, event: Started) -> None:
        self.starts += 1
        if self.starts == 1:
            self.journal.write(event)
        else:
            resumed_step = event.resumed_from or 0
            if event.workers != self._workers:
                self.journal.write(
                    Resized(
                        from_workers=self._workers,
                        to_workers=event.workers,
                        layout=event.layout,
                        reason=self.restart_reason,
                        step=resumed_step,
                    )
                )
            self.journal.write(
                Restarted(
                    reason=self.restart_reason,
                    resumed_from=event.resumed_from,
                    workers=event.workers,
                    repeated=max(0, self.last_step - resumed_step),
                    lost_s=round(time.monotonic() - self._stepped_at, 3) if self._stepped_at else None,
                )
            )
        self._workers = event.workers
