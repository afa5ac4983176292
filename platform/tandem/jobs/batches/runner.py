"""Runner of batches: a thread for each checks the input file, queues its requests, and writes the output when all have ended.

Gateways send the requests (`gateway.work.batch_worker`). Every step may be repeated: a dispatcher that follows one which died
starts the thread again, and it goes on with what is there.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tandem.api.openai import batches as wire
from tandem.errors import StorageError, TandemError
from tandem.files.checks.child import ContentCheck
from tandem.files.content import ContentStore, open_content
from tandem.files.outputs import write_output
from tandem.files.records import Purpose
from tandem.files.store import FileStore
from tandem.ids import fingerprint
from tandem.jobs.batches.answers import AnswerPlace, Ended, SegmentReader, lines_of
from tandem.jobs.batches.stored import answers_folder, items_of
from tandem.jobs.dispatch.runner import RunState, RunStatus
from tandem.jobs.work.queue import ItemQueue
from tandem.jobs.work.records import Item, Job, split_run_name
from tandem.jobs.work.states import State
from tandem.jobs.work.store import JobStore
from tandem.registry.conditions import Condition

POLL_S, COUNTED_PER_S = 1.0, 5000
"""Seconds between two looks at a batch, at least, and requests that are counted for each second between them."""
CHECK_TIMEOUT_S = 600.0
PAGE = 1000
ENDINGS = {
    State.CANCELLED: ("batch_cancelled", "The batch was cancelled before this request was answered."),
    State.EXPIRED: ("batch_expired", "The batch's window ended before this request was answered."),
}
"""Code and message of requests without an answer, by their state."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Run:
    """One attempt of a batch, in a thread of this process."""

    job: Job
    stop: threading.Event = field(default_factory=threading.Event)
    ends: bool = False
    """Whether it is stopped for good: what is answered is its output."""
    status: RunStatus = field(default_factory=lambda: RunStatus(state=RunState.RUNNING))


class BatchRunner:
    """See `tandem.jobs.dispatch.runner.Runner`. Handles are the attempts' names."""

    def __init__(
        self,
        store: JobStore,
        queue: ItemQueue,
        files: FileStore,
        contents: ContentStore,
        *,
        tenant_bytes: int,
        max_attempts: int,
    ) -> None:
        """`tenant_bytes`: of the files of one tenant at most. `max_attempts`: of each request."""
        self._store = store
        self._queue = queue
        self._files = files
        self._contents = contents
        self._tenant_bytes = tenant_bytes
        self._max_attempts = max_attempts
        self._runs: dict[str, _Run] = {}

    def start(self, job: Job) -> str:
        """See `Runner`."""
        if job.run_name not in self._runs:
            run = self._runs[job.run_name] = _Run(job)
            threading.Thread(target=self._work, args=(run,), name=job.run_name, daemon=True).start()
        return job.run_name

    def find(self, job: Job) -> str | None:
        """See `Runner`."""
        return job.run_name if job.run_name in self._runs else None

    def state(self, handle: str) -> RunStatus | None:
        """See `Runner`. A run of a process that died goes on here."""
        if handle not in self._runs:
            self.start(self._store.get(split_run_name(handle)[0]))
        run = self._runs[handle]
        if run.status.state is not RunState.RUNNING:
            self._runs.pop(handle, None)
        return run.status

    def stop(self, job: Job) -> None:
        """See `Runner`."""
        if (run := self._runs.get(job.run_name)) is not None:
            run.ends = job.state in (State.STOPPING, State.EXPIRING)
            run.stop.set()

    # ---- one batch ----

    def _work(self, run: _Run) -> None:
        try:
            run.status = self._run(run)
        except TandemError as error:
            run.status = RunStatus(state=RunState.FAILED, error=str(error), retryable=isinstance(error, StorageError))
        except Exception as error:
            log.exception("The batch %s failed.", run.job.id)
            run.status = RunStatus(state=RunState.FAILED, error=f"{type(error).__name__}: {error}", retryable=True)

    def _run(self, run: _Run) -> RunStatus:
        job = run.job
        # Also where a run before this one has done it, or a part of it.
        errors = self._check(job)
        if errors is not None:
            result = {"errors": errors.model_dump()}
            return RunStatus(state=RunState.FAILED, error=errors.data[0].message, retryable=False, result=result)
        self._enqueue(job)
        pause_s = POLL_S
        while not run.stop.wait(pause_s):
            counts = self._queue.counts(job.id)
            # Counting takes longer, and matters less, where there are many.
            pause_s = max(POLL_S, sum(counts.values()) / COUNTED_PER_S)
            # Where requests were cancelled or have expired the batch is told to stop next: it has not finished.
            if all(state.ended and state not in ENDINGS for state in counts):
                return RunStatus(state=RunState.FINISHED, result=self._write_outputs(job))
        return RunStatus(state=RunState.STOPPED, result=self._write_outputs(job) if run.ends else None)

    def _check(self, job: Job) -> wire.BatchErrors | None:
        """The findings about the input file; None: it can be used."""
        report = ContentCheck().run(Purpose.BATCH, job.spec["location"], CHECK_TIMEOUT_S, endpoint=job.spec["endpoint"])
        if not report.findings:
            return None
        return wire.BatchErrors(
            data=[
                wire.BatchError(code=finding.code, message=finding.message, line=finding.line, param=finding.param)
                for finding in report.findings
            ]
        )

    def _enqueue(self, job: Job) -> None:
        with open_content(job.spec["location"]) as file:
            items = items_of(job, file, self._max_attempts)
            while page := list(itertools.islice(items, PAGE)):
                self._queue.add(page)

    def _write_outputs(self, job: Job) -> Mapping[str, Any]:
        """Write output and error file; the result of the job."""
        reader = SegmentReader(answers_folder(job.id))
        counts = {True: 0, False: 0}

        def lines(answered: bool) -> Iterator[bytes]:
            for is_answered, line in lines_of(self._ended(job), reader):
                if is_answered is answered:
                    counts[answered] += 1
                    yield line + b"\n"

        try:
            output_id = self._write(job, "output", lines(True))
            error_id = self._write(job, "error", lines(False))
        finally:
            reader.close()
        return {
            "output_file_id": output_id,
            "error_file_id": error_id,
            "completed": counts[True],
            "failed": counts[False],
        }

    def _write(self, job: Job, kind: str, lines: Iterable[bytes]) -> str | None:
        """The id of a file with these lines; None where there are none."""
        lines = iter(lines)
        first = next(lines, None)
        if first is None:
            return None
        record = write_output(
            self._files,
            self._contents,
            itertools.chain([first], lines),
            tenant=job.tenant,
            purpose=Purpose.BATCH_OUTPUT,
            filename=f"{job.id}_{kind}.jsonl",
            quota_bytes=self._tenant_bytes,
            lifetime_s=job.spec.get("output_lifetime_s"),
            once=Condition(once=fingerprint(f"{kind} of {job.id}")),
        )
        return record.id

    def _ended(self, job: Job) -> Iterator[Ended]:
        """The requests that have ended, in the order of the input."""
        after = -1
        while page := self._queue.items(job.id, after=after, limit=PAGE):
            after = page[-1].position if page[-1].position is not None else after
            yield from (_ended(item) for item in page)


def _ended(item: Item) -> Ended:
    custom_id = str((item.payload or {}).get("custom_id", ""))
    if item.result_reference is not None:
        return Ended(item_id=item.id, custom_id=custom_id, place=AnswerPlace.parse(item.result_reference))
    # One that is not marked as ended yet was cancelled or has expired with its batch.
    code, message = ENDINGS.get(item.state, ("request_failed", item.error or ENDINGS[State.CANCELLED][1]))
    return Ended(item_id=item.id, custom_id=custom_id, error_code=code, error=message)
