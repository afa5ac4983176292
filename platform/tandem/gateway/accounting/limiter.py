"""Limiter: a gateway's access to the ledger of limits, its own or the one that all gateways of an app share.

A shared ledger is asked in batches: while one call is under way, operations collect for the next. While it does not answer, each
gateway applies its equal share of each limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from tandem.limits import Admit, LimitLedger, Reservation, Restore, Settle, Subject, Verdict
from tandem.limits.ledger import SILENT_S, Operation

TOTALS_S = 5.0
"""Seconds between two looks at today's tokens in the database."""
ANSWER_S = 2.0
"""Seconds that a shared ledger may take to answer."""
IDLE_S = 1.0
"""Longest pause between two calls to a shared ledger: it counts a silent gateway's requests as ended."""

ApplyLimits = Callable[[str, tuple[Operation, ...], dict[str, int] | None], Awaitable[tuple[str, list[Verdict]]]]
"""Applies a gateway's operations, and today's tokens where they are known anew, to a shared ledger; returns the ledger's id and
the verdicts."""
ReadTotals = Callable[[], dict[str, int]]
"""Reads today's tokens by subject from the database."""

log = logging.getLogger(__name__)


class Limiter:
    """The limits at one gateway; used in its event loop."""

    def __init__(
        self, gateway: str, *, gateways: int = 1, apply: ApplyLimits | None = None, totals: ReadTotals | None = None
    ) -> None:
        """`apply`: the ledger that `gateways` gateways share; None: this gateway is the only one."""
        self._gateway = gateway
        self._gateways = gateways
        self._apply = apply
        self._read_totals = totals
        self._totals: dict[str, int] | None = None
        """Today's tokens, read but not told to the shared ledger yet."""
        self._ledger = LimitLedger()
        """This gateway's own: of all requests, or of those during which the shared one did not answer."""
        self._ledger_id: str | None = None
        self._in_flight: dict[str, Reservation] = {}
        """Reservations that the shared ledger knows."""
        self._pending: list[tuple[Operation, asyncio.Future[Verdict] | None]] = []
        self._answered_at = time.time()
        """When the shared ledger answered last."""
        self._wakeup = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to follow the day's totals and to talk to a shared ledger."""
        with contextlib.suppress(Exception):  # logged by the task, which tries again
            await self._refresh_totals()
        if self._read_totals is not None:
            self._tasks.append(asyncio.create_task(self._follow_totals()))
        if self._apply is not None:
            self._tasks.append(asyncio.create_task(self._talk(self._apply)))

    async def stop(self) -> None:
        """Stop; what has ended is told to the shared ledger before."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._apply is not None and self._pending:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._exchange(self._apply), ANSWER_S)

    async def admit(self, reservation: Reservation) -> Verdict:
        """Reserve what a request needs, or refuse it. Each admitted one must be settled."""
        if self._apply is None:
            return self._ledger.apply(self._gateway, (Admit(reservation),), time.time())[0]
        answer: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._pending.append((Admit(reservation), answer))
        self._wakeup.set()
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            # It may be admitted still, and nobody would settle it.
            answer.add_done_callback(lambda _: self.settle(reservation.id, None))
            raise

    def settle(self, id_: str, tokens: int | None) -> None:
        """A request has ended and has used `tokens`; None: not known."""
        known = self._in_flight.pop(id_, None)
        if known is None:
            self._ledger.apply(self._gateway, (Settle(id_, tokens),), time.time())
        else:
            self._pending.append((Settle(id_, tokens), None))
            self._wakeup.set()

    async def _talk(self, apply: ApplyLimits) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_S):
                    await self._wakeup.wait()
            self._wakeup.clear()
            await self._exchange(apply)

    async def _exchange(self, apply: ApplyLimits) -> None:
        """Send what is pending, and hand out the verdicts."""
        pending, self._pending = self._pending, []
        totals, self._totals = self._totals, None
        try:
            async with asyncio.timeout(ANSWER_S):
                ledger_id, verdicts = await apply(self._gateway, tuple(each for each, _ in pending), totals)
        except BaseException as error:
            self._fall_back(pending, error)
            if not isinstance(error, Exception):
                raise
            return
        if self._ledger_id not in (None, ledger_id):
            # A new ledger knows neither what is in flight nor what was used today.
            self._pending = [*((Restore(each), None) for each in self._in_flight.values()), *self._pending]
            with contextlib.suppress(Exception):
                await self._refresh_totals()
            self._wakeup.set()
        self._ledger_id, self._answered_at = ledger_id, time.time()
        answers = iter(verdicts)
        for operation, future in pending:
            if not isinstance(operation, Admit):
                continue
            verdict = next(answers)
            if verdict.refusal is None:
                self._in_flight[operation.reservation.id] = operation.reservation
            if future is not None and not future.done():
                future.set_result(verdict)

    def _fall_back(self, pending: list[tuple[Operation, asyncio.Future[Verdict] | None]], error: BaseException) -> None:
        """Decide alone, by this gateway's share. What has ended is told again later."""
        log.warning("The shared limits do not answer (%s): this gateway applies its share.", type(error).__name__)
        now = time.time()
        ended: list[Operation] = []
        for operation, future in pending:
            if isinstance(operation, Admit) and future is not None:
                share = operation.reservation._replace(
                    subjects=tuple(_share(each, self._gateways) for each in operation.reservation.subjects)
                )
                (verdict,) = self._ledger.apply(self._gateway, (Admit(share),), now)
                # The shared ledger may have admitted it before its answer was lost; it would count there for ever.
                ended.append(Settle(share.id, None))
                if not future.done():
                    future.set_result(verdict)
            else:
                ended.append(operation)
        # After that time the ledger has ended this gateway's requests by itself.
        if now - self._answered_at <= SILENT_S:
            self._pending += [(operation, None) for operation in ended]

    async def _follow_totals(self) -> None:
        while True:
            await asyncio.sleep(TOTALS_S)
            try:
                await self._refresh_totals()
            except Exception as error:  # noqa: BLE001 - the next look may succeed
                log.warning("Today's usage could not be read: %s", str(error) or type(error).__name__)

    async def _refresh_totals(self) -> None:
        if self._read_totals is None:
            return
        async with asyncio.timeout(2 * TOTALS_S):
            totals = await asyncio.to_thread(self._read_totals)
        self._ledger.observe_day(totals, time.time())
        self._totals = totals


def _share(subject: Subject, gateways: int) -> Subject:
    """A subject with one gateway's share of its limits, rounded up."""
    known = subject.limits
    shared = {
        name: -(-value // gateways)
        for name in ("requests_per_minute", "tokens_per_minute", "concurrent_requests", "tokens_per_day")
        if (value := getattr(known, name)) is not None
    }
    return Subject(subject.id, replace(known, **shared))
