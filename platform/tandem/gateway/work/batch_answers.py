"""Answers of batches at a gateway until they are durable and reported to the queue, batch by batch."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence

from tandem.errors import RegistryUnreachableError
from tandem.gateway.work.batch_sender import Outcome
from tandem.gateway.work.open_files import OpenFiles
from tandem.jobs.batches.answers import AnswerPlace, SegmentWriter
from tandem.jobs.batches.stored import answers_folder
from tandem.jobs.work.queue import ItemQueue
from tandem.jobs.work.records import Answer, Lease

log = logging.getLogger(__name__)

InThread = Callable[..., Awaitable[None]]
"""Runs blocking work in the one thread of segments and of the queue."""


class UnreportedAnswers:
    """Outcomes of requests. What cannot be written stays here, and is written later."""

    def __init__(self, queue: ItemQueue) -> None:
        self._queue = queue
        self._by_job: dict[str, list[Outcome]] = defaultdict(list)
        self._failing: dict[str, str] = {}
        """Tenants of the jobs whose answers could not be written at the last try."""
        self._segments = OpenFiles[SegmentWriter]()

    @property
    def num_bytes(self) -> int:
        """Bytes of answers that are held."""
        return sum(len(one.answer.line) for each in self._by_job.values() for one in each if one.answer is not None)

    @property
    def leases(self) -> list[Lease]:
        """The leases of the outcomes."""
        return [one.lease for each in self._by_job.values() for one in each]

    @property
    def failing_tenants(self) -> set[str]:
        """Tenants with a job whose answers could not be written at the last try."""
        return set(self._failing.values())

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome for the next report."""
        self._by_job[str(outcome.item.job)].append(outcome)

    def discard(self, lost: Collection[Lease]) -> None:
        """Forget the outcomes under leases that are lost: their reports would be refused."""
        for job in list(self._by_job):
            self._by_job[job] = [one for one in self._by_job[job] if one.lease not in lost]
            if not self._by_job[job]:
                del self._by_job[job]
                self._failing.pop(job, None)

    async def report(self, in_thread: InThread) -> None:
        """Write and report what there is. A job whose answers cannot be written delays no other one.

        RegistryUnreachableError where the queue does not answer: nothing is lost.
        """
        for job in list(self._by_job):
            outcomes = self._by_job.pop(job)
            try:
                await in_thread(self._write, job, outcomes)
                self._failing.pop(job, None)
            except BaseException as error:
                self._by_job[job] = outcomes + self._by_job.pop(job, [])
                if isinstance(error, RegistryUnreachableError) or not isinstance(error, Exception):
                    raise
                if job not in self._failing:
                    log.exception("Answers of the batch %s cannot be written; it is tried again.", job)
                self._failing[job] = outcomes[0].item.tenant
        await in_thread(self._segments.close_unused)

    def close(self) -> None:
        """Close the segments; in the thread that writes them."""
        self._segments.close()

    def _write(self, job: str, outcomes: Sequence[Outcome]) -> None:
        lines = [one.answer for one in outcomes if one.answer is not None]
        places: Iterator[AnswerPlace] = iter(())
        if lines:
            segment = self._segments.get(job, lambda: SegmentWriter(answers_folder(job)))
            try:
                places = iter(segment.append(lines))
            except BaseException:
                # Its descriptor may be of no more use.
                self._segments.discard(job)
                raise
        self._queue.report(
            [
                Answer(lease=one.lease, result_reference=str(next(places)))
                if one.answer is not None
                else Answer(lease=one.lease, error=one.error, retryable=one.retryable, retry_after_s=one.retry_after_s)
                for one in outcomes
            ]
        )
