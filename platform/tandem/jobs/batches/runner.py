"""Runner of batches: file and models are checked, the requests are queued, and the output is written when all have ended.

Gateways send the requests (`gateway.work.batch_worker`). The dispatcher's look at a batch takes it one step further; steps that
take long run in a few threads. Every step may be repeated: a dispatcher that follows one which died goes on with what is there,
and a step that met a database, disk or store which is away is taken again after a pause.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from enum import StrEnum

from tandem.api.openai import batches as wire
from tandem.errors import (
    FileError,
    FileQuotaError,
    IllegalTransitionError,
    LeaseLostError,
    RegistryUnreachableError,
    StorageError,
    TandemError,
)
from tandem.files.checks.child import UNCHECKED, ContentCheck
from tandem.files.content import ContentStore
from tandem.files.records import Purpose
from tandem.files.store import FileStore
from tandem.jobs.batches.model_checks import ModelChecks
from tandem.jobs.batches.outputs import BatchOutputs
from tandem.jobs.batches.requests import list_requests
from tandem.jobs.batches.stored import items_of
from tandem.jobs.dispatch.runner import RunState, RunStatus
from tandem.jobs.work.queue import ItemQueue
from tandem.jobs.work.records import Job, split_run_name
from tandem.jobs.work.states import State
from tandem.jobs.work.store import JobStore
from tandem.observability.events import RequestsQueued

POLL_S, PAUSE_S = 1.0, 5.0
"""Seconds between two looks for batches that are answered, and before a step that could not be taken is taken again."""
LOOKUP_S, LOOKUP_POLL_S = 3.0, 0.2
"""Seconds for which a step waits for gateways to look up a batch's models, and between two looks."""
QUOTA_PAUSE_S = 60.0
"""Seconds before an output is written again for which its tenant had no bytes left."""
STEPS_AT_ONCE = 4
"""Batches that are checked, queued or written at once."""
CHECK_TIMEOUT_S = 600.0
PAGE = 1000
"""Requests that are queued at once."""
MOST_EVENTS = 10_000
AWAY = (RegistryUnreachableError, StorageError, LeaseLostError, IllegalTransitionError)
"""Errors of a step that pass: of what is away for the moment, or where a request to leave has not reached the run yet."""
ENDING = (State.STOPPING, State.EXPIRING)
"""States of a batch whose run is to end for good."""
RUNNING = RunStatus(state=RunState.RUNNING)

log = logging.getLogger(__name__)


class Phase(StrEnum):
    """What a run does now."""

    PREPARE = "prepare"
    """The file is checked."""
    VERIFY = "verify"
    """Gateways look up the models that the requests name; then the requests are queued."""
    WAIT = "wait"
    """Gateways answer the requests."""
    COLLECT = "collect"
    """The answers are written to the output."""


@dataclass(slots=True)
class _Run:
    """One attempt of a batch in this process."""

    job: Job
    phase: Phase = Phase.PREPARE
    stop: threading.Event = field(default_factory=threading.Event)
    ends: bool = False
    """Whether it is stopped for good: what is answered is its output."""
    lines: Mapping[str, int] = field(default_factory=dict)
    """The models that its requests name, each with the first line that does."""
    status: RunStatus = RUNNING
    step: threading.Thread | None = None
    next_step_at: float = 0.0
    """Monotonic clock."""

    @property
    def is_busy(self) -> bool:
        """Whether a step is being taken."""
        return self.step is not None and self.step.is_alive()


class BatchRunner:
    """See `tandem.jobs.dispatch.runner.Runner`. Handles are the attempts' names."""

    def __init__(
        self,
        store: JobStore,
        queue: ItemQueue,
        checks: ModelChecks,
        files: FileStore,
        contents: ContentStore,
        *,
        tenant_bytes: int,
        max_attempts: int,
    ) -> None:
        """`tenant_bytes`: of the files of one tenant at most. `max_attempts`: of each request."""
        self._store = store
        self._queue = queue
        self._checks = checks
        self._outputs = BatchOutputs(queue, files, contents, tenant_bytes)
        self._max_attempts = max_attempts
        self._runs: dict[str, _Run] = {}
        self._answered: Set[str] = frozenset()
        """Ids of batches that were answered whole at the last look."""
        self._looked_at = -POLL_S

    def start(self, job: Job) -> str:
        """See `Runner`."""
        if job.run_name not in self._runs:
            self._runs[job.run_name] = _Run(job)
            if job.state.leaving:
                self.stop(job)
            self._advance(self._runs[job.run_name])
        return job.run_name

    def find(self, job: Job) -> str | None:
        """See `Runner`."""
        return job.run_name if job.run_name in self._runs else None

    def state(self, handle: str) -> RunStatus | None:
        """See `Runner`. A run of a process that died goes on here."""
        if handle not in self._runs:
            self.start(self._store.get(split_run_name(handle)[0]))
        run = self._runs.get(handle)
        if run is None:
            return None
        if run.status.state is RunState.RUNNING:
            self._advance(run)
        if run.status.state is RunState.STOPPED and not run.ends:
            # It was paused: it may have been told to end since.
            job = self._store.get(run.job.id)
            if job.state in ENDING:
                self.stop(job)
                run.status = RUNNING
        status = run.status
        if status.state is not RunState.RUNNING:
            self._runs.pop(handle, None)
        return status

    def stop(self, job: Job) -> None:
        """See `Runner`."""
        if (run := self._runs.get(job.run_name)) is not None:
            run.ends = job.state in ENDING
            run.stop.set()

    # ---- one batch ----

    def _advance(self, run: _Run) -> None:
        """Begin the next step of a run if it is due and a thread is free."""
        if run.is_busy:
            return
        if run.stop.is_set() or (run.phase is Phase.WAIT and self._is_answered(run)):
            run.phase = Phase.COLLECT
        if run.phase is Phase.WAIT or time.monotonic() < run.next_step_at:
            return
        if sum(other.is_busy for other in self._runs.values()) < STEPS_AT_ONCE:
            run.step = threading.Thread(target=self._take_step, args=(run,), name=run.job.run_name, daemon=True)
            run.step.start()

    def _is_answered(self, run: _Run) -> bool:
        """Whether all requests of a run had ended at the last look, which was for all runs together."""
        now = time.monotonic()
        if now - self._looked_at >= POLL_S:
            waiting = [each.job.id for each in self._runs.values() if each.phase is Phase.WAIT]
            self._answered, self._looked_at = self._queue.answered(waiting), now
        return run.job.id in self._answered

    def _take_step(self, run: _Run) -> None:
        try:
            match run.phase:
                case Phase.PREPARE:
                    self._prepare(run)
                case Phase.VERIFY:
                    self._verify(run)
                case _:
                    run.status = self._collect(run)
        except AWAY as error:
            log.warning("Batch %s: %s It is tried again in %g s.", run.job.id, error, PAUSE_S)
            run.next_step_at = time.monotonic() + PAUSE_S
        except TandemError as error:
            run.status = RunStatus(state=RunState.FAILED, error=str(error), retryable=False)
        except Exception as error:
            log.exception("The batch %s failed.", run.job.id)
            run.status = RunStatus(state=RunState.FAILED, error=f"{type(error).__name__}: {error}", retryable=True)

    def _prepare(self, run: _Run) -> None:
        """Check the file and ask for its models, unless a run before this one has queued its requests."""
        job = run.job
        events = self._store.events(job.id, limit=MOST_EVENTS)
        if any(isinstance(numbered.event, RequestsQueued) for numbered in events):
            run.phase = Phase.WAIT
        elif (failed := self._check(run)) is not None:
            run.status = failed
        else:
            self._checks.ask(job.id, run.lines)
            run.phase = Phase.VERIFY
            self._verify(run)

    def _verify(self, run: _Run) -> None:
        """Queue the requests once their models are known to be usable. It ends early where it is stopped."""
        # Gateways answer soon; where none is there, the thread is given back.
        end = time.monotonic() + LOOKUP_S
        while (refusals := self._checks.refusals(run.job.id)) is None and time.monotonic() < end:
            if run.stop.wait(LOOKUP_POLL_S):
                return
        if refusals is None:
            run.next_step_at = time.monotonic() + POLL_S
            return
        # A step that is taken again finds none, and no refusals.
        self._checks.forget(run.job.id)
        if refusals:
            errors = [
                wire.BatchError(code=refusal.code, message=refusal.message, line=run.lines[model], param="body.model")
                for model, refusal in sorted(refusals.items(), key=lambda each: run.lines[each[0]])
            ]
            run.status = _unusable(errors)
        else:
            count = self._enqueue(run)
            if run.stop.is_set():
                return
            lease = self._store.get(run.job.id).lease
            if lease is not None:
                self._store.append(lease, [RequestsQueued(count=count)])
            run.phase = Phase.WAIT

    def _check(self, run: _Run) -> RunStatus | None:
        """The end of a batch whose input file cannot be used, or could not be checked now; None: it can be used."""
        job = run.job
        try:
            report = ContentCheck().run(
                Purpose.BATCH, job.spec["location"], CHECK_TIMEOUT_S, endpoint=job.spec["endpoint"]
            )
        except FileError as error:
            # Its store may answer later.
            return RunStatus(state=RunState.FAILED, error=str(error), retryable=True)
        run.lines = report.models
        if not report.findings:
            return None
        errors = [
            wire.BatchError(code=finding.code, message=finding.message, line=finding.line, param=finding.param)
            for finding in report.findings
        ]
        if errors[0].code in UNCHECKED:
            return RunStatus(state=RunState.FAILED, error=errors[0].message, retryable=True)
        return _unusable(errors)

    def _enqueue(self, run: _Run) -> int:
        """Queue the requests page by page until the run is stopped; returns their number."""
        count = 0
        with contextlib.closing(list_requests(run.job.spec["location"])) as requests:
            items = items_of(run.job, requests, self._max_attempts)
            while not run.stop.is_set() and (page := list(itertools.islice(items, PAGE))):
                self._queue.add(page)
                count += len(page)
        return count

    def _collect(self, run: _Run) -> RunStatus:
        """Write the output, unless the run is to go on later."""
        is_stopped = run.stop.is_set()
        if is_stopped and not run.ends:
            return RunStatus(state=RunState.STOPPED)
        self._checks.forget(run.job.id)
        try:
            result = self._outputs.write(run.job)
        except FileQuotaError as error:
            if is_stopped:
                return RunStatus(state=RunState.FAILED, error=f"The output was not written: {error}", retryable=False)
            self._store.explain({run.job.id: str(error)}, State.RUNNING)
            run.next_step_at = time.monotonic() + QUOTA_PAUSE_S
            return RUNNING
        return RunStatus(state=RunState.STOPPED if is_stopped else RunState.FINISHED, result=result)


def _unusable(errors: list[wire.BatchError]) -> RunStatus:
    """The end of a batch whose input file cannot be used."""
    result = {"errors": wire.BatchErrors(data=errors).model_dump()}
    return RunStatus(state=RunState.FAILED, error=errors[0].message, retryable=False, result=result)
