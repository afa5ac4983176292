"""Limiter: a gateway's access to the ledger of limits, its own or the one that all gateways of an app share.

A shared ledger is asked in batches: while one call is under way, operations collect for the next. While it does not answer, each
gateway decides at once by its equal share of each limit, and asks the ledger again in the background. When that answers, it is
told all that is in flight.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace

from tandem.limits import (
    Admit,
    Answer,
    DayTotals,
    Exchange,
    LimitLedger,
    Moment,
    Reservation,
    Settle,
    Subject,
    Verdict,
)
from tandem.limits.ledger import SILENT_S
from tandem.limits.records import Operation

TOTALS_S = 5.0
"""Seconds between two reads of today's tokens from the database."""
ANSWER_S = 2.0
"""Seconds that a shared ledger may take to answer."""
IDLE_S = 1.0
"""Longest pause between two calls to a shared ledger, and the pause where it does not answer: it counts a silent gateway's
requests as ended."""

ApplyLimits = Callable[[Exchange], Awaitable[Answer]]
"""Sends an exchange to the shared ledger."""
ReadTotals = Callable[[], Awaitable[DayTotals]]
"""Reads today's tokens from the database."""
PendingAdmission = tuple[Reservation, "asyncio.Future[Verdict]"]

log = logging.getLogger(__name__)


class Limiter:
    """The limits at one gateway; used in its event loop."""

    def __init__(
        self, gateway: str, *, gateways: int = 1, apply: ApplyLimits | None = None, totals: ReadTotals | None = None
    ) -> None:
        """`apply`: the ledger that `gateways` gateways share; None: this gateway is the only one."""
        # Numbers of exchanges begin anew with each process.
        self._gateway = f"{gateway}-{uuid.uuid4().hex[:8]}"
        self._counter = itertools.count(1)
        self._gateways = gateways
        self._apply = apply
        self._read_totals = totals
        self._day_totals: DayTotals | None = None
        self._unsent_totals: DayTotals | None = None
        """`_day_totals`, until they have been sent to the shared ledger."""
        self._ledger = LimitLedger()
        """This gateway's own: of all requests, or of those that were admitted while the shared one did not answer."""
        self._in_flight: dict[str, Reservation] = {}
        """All requests in flight, where there is a shared ledger."""
        self._pending: list[PendingAdmission] = []
        self._pending_settles: list[Settle] = []
        self._resend = True
        """Whether the next exchange sends all reservations in flight."""
        self._is_unreachable = False
        """Whether the last exchange with the shared ledger failed."""
        self._answered_at = time.monotonic()
        self._wakeup = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to follow the day's totals and to talk to a shared ledger."""
        with contextlib.suppress(Exception):  # logged by the task, which tries again
            await self._refresh_totals()
        if self._read_totals is not None:
            self._tasks.append(asyncio.create_task(self._follow_totals()))
        if self._apply is not None:
            self._tasks.append(asyncio.create_task(self._exchange_loop(self._apply)))

    async def stop(self) -> None:
        """Send the pending settlements to the shared ledger, and stop."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._apply is not None:
            if self._pending_settles:
                with contextlib.suppress(Exception):
                    await self._exchange(self._apply)
            # Nobody asks it any more.
            self._is_unreachable = True

    async def admit(self, reservation: Reservation) -> Verdict:
        """Reserve a request's tokens, or refuse it. Each admitted one must be settled."""
        if self._apply is None:
            return self._ledger.apply(self._gateway, (Admit(reservation),), Moment.now())[0]
        if self._is_unreachable:
            return self._decide(reservation)
        verdict: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._pending.append((reservation, verdict))
        self._wakeup.set()
        try:
            return await asyncio.shield(verdict)
        except asyncio.CancelledError:
            # The ledger may admit it later, and this coroutine cannot settle it then.
            verdict.add_done_callback(lambda _: self.settle(reservation.id, None))
            raise

    def settle(self, id_: str, tokens: int | None, min_tokens: int = 0) -> None:
        """A request has ended and has used `tokens`; None: not known, at least those that were `min_tokens`."""
        settle = Settle(id_, tokens, min_tokens)
        self._ledger.apply(self._gateway, (settle,), Moment.now())
        if self._in_flight.pop(id_, None) is not None and not self._is_expired:
            self._pending_settles.append(settle)
            self._wakeup.set()

    @property
    def _is_expired(self) -> bool:
        """Whether the shared ledger has ended this gateway's requests by itself, or will at the next exchange."""
        return self._is_unreachable and time.monotonic() - self._answered_at > SILENT_S

    async def _exchange_loop(self, apply: ApplyLimits) -> None:
        while True:
            if self._is_unreachable:
                await asyncio.sleep(IDLE_S)
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(IDLE_S):
                        await self._wakeup.wait()
            self._wakeup.clear()
            try:
                await self._exchange(apply)
            except Exception:
                log.exception("The shared limits could not be asked; they are asked again in %g s.", IDLE_S)

    async def _exchange(self, apply: ApplyLimits) -> None:
        """Send what is pending, and set the verdicts; if the ledger does not answer, decide by this gateway's share."""
        pending, self._pending = self._pending, []
        settles, self._pending_settles = self._pending_settles, []
        resend, self._resend = self._resend, False
        unsent_totals, self._unsent_totals = self._unsent_totals, None
        operations: tuple[Operation, ...] = (*settles, *(Admit(reservation) for reservation, _ in pending))
        reservations = tuple(self._in_flight.values()) if resend else None
        try:
            async with asyncio.timeout(ANSWER_S):
                answer = await apply(
                    Exchange(self._gateway, next(self._counter), operations, reservations, unsent_totals)
                )
            if answer.resend:
                self._pending, self._pending_settles = pending + self._pending, settles + self._pending_settles
                self._resend, self._unsent_totals = True, self._day_totals
                self._wakeup.set()
                return
            verdicts = list(zip(pending, answer.verdicts, strict=True))
        except BaseException as error:
            self._fall_back(pending, settles, error)
            if not isinstance(error, Exception):
                raise
            return
        if self._is_unreachable:
            log.info("The shared limits answer again.")
        self._is_unreachable, self._answered_at = False, time.monotonic()
        if self._resend:
            # Requests were admitted here meanwhile.
            self._wakeup.set()
        for (reservation, future), verdict in verdicts:
            if verdict.refusal is None:
                self._in_flight[reservation.id] = reservation
            if not future.done():
                future.set_result(verdict)

    def _fall_back(self, pending: list[PendingAdmission], settles: list[Settle], error: BaseException) -> None:
        """Decide the pending admissions by this gateway's share, as all others until the shared ledger answers."""
        if not self._is_unreachable:
            log.warning("The shared limits do not answer (%s): this gateway applies its share.", type(error).__name__)
        self._is_unreachable = self._resend = True
        self._unsent_totals = self._day_totals
        self._pending_settles = [] if self._is_expired else settles + self._pending_settles
        waiting, self._pending = pending + self._pending, []
        for reservation, future in waiting:
            verdict = self._decide(reservation)
            if not future.done():
                future.set_result(verdict)

    def _decide(self, reservation: Reservation) -> Verdict:
        """Apply this gateway's share of the limits."""
        subjects = tuple(_share(subject, self._gateways) for subject in reservation.subjects)
        admit = Admit(reservation._replace(subjects=subjects))
        (verdict,) = self._ledger.apply(self._gateway, (admit,), Moment.now())
        if verdict.refusal is None:
            self._in_flight[reservation.id] = reservation
            self._resend = True
        return verdict

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
        totals = await self._read_totals()
        self._ledger.observe_day(totals, Moment.now())
        self._day_totals = self._unsent_totals = totals


def _share(subject: Subject, gateways: int) -> Subject:
    """A subject with one gateway's share of its limits, rounded up. A budget of the day is not divided: each gateway reads the
    total that all have used.
    """
    limits = subject.limits
    shares = {
        name: -(-value // gateways)
        for name in ("requests_per_minute", "tokens_per_minute", "concurrent_requests")
        if (value := getattr(limits, name)) is not None
    }
    return Subject(subject.id, replace(limits, **shares))
