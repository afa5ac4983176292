"""Demand report: numbers of waiting requests, sent to the directory for autoscaling and for starting the first replica."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping

from tandem.routing.records import ServedModel
from tandem.tasks import stop

ReportDemand = Callable[[dict[str, int]], Awaitable[None]]
"""Sends numbers of waiting requests by deployment."""
CountWaiting = Callable[[], Mapping[str, int]]
"""Returns numbers of waiting requests by model id."""

CHECK_PERIOD_S = 0.1
"""Seconds between two checks of the queues."""
REPORT_PERIOD_S = 1.0
"""Seconds after which unchanged numbers are sent again; the directory expires them otherwise."""


class DemandReport:
    """Reports waiting requests of models that scale; one for each gateway, in its event loop."""

    def __init__(self, models: Iterable[ServedModel], waiting: CountWaiting, report_demand: ReportDemand) -> None:
        self._deployments = {model.id: model.deployment for model in models if model.config.autoscaling is not None}
        self._waiting = waiting
        self._report_demand = report_demand
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start reporting, if any model scales."""
        if self._deployments:
            self._task = asyncio.create_task(self._report())

    async def stop(self) -> None:
        """Stop reporting; the directory expires this gateway's numbers."""
        await stop(self._task)

    def current(self) -> dict[str, int]:
        """Waiting requests by deployment."""
        counts = {
            self._deployments[model]: count for model, count in self._waiting().items() if model in self._deployments
        }
        return {deployment: count for deployment, count in counts.items() if count > 0}

    async def _report(self) -> None:
        reported: dict[str, int] = {}
        reported_at = 0.0
        while True:
            waiting = self.current()
            is_due = time.monotonic() - reported_at >= REPORT_PERIOD_S
            # New and vanished deployments are reported at once, changed numbers every REPORT_PERIOD_S.
            if waiting.keys() != reported.keys() or (waiting and is_due):
                # A directory that is being replaced does not answer; the next report reaches the new one.
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(self._report_demand(waiting), 5 * REPORT_PERIOD_S)
                    reported, reported_at = waiting, time.monotonic()
            await asyncio.sleep(CHECK_PERIOD_S)
