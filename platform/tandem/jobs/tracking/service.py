"""Service of the native API for jobs of every kind and for the queue. Without HTTP; blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection

from tandem.api import jobs as wire
from tandem.files.store import FileStore
from tandem.jobs.file_jobs import requeue_with_files
from tandem.jobs.tracking.history import EventFeed, JobHistory, event_to_wire
from tandem.jobs.tracking.lineage import lineage_of
from tandem.jobs.tracking.logs import LogFeed, LogSource
from tandem.jobs.tracking.metrics import series_of
from tandem.jobs.tracking.positions import BEGINNING, Position
from tandem.jobs.tracking.queue_state import QueueState
from tandem.jobs.tracking.view import job_to_wire
from tandem.jobs.work.states import REQUESTED, Action, JobKind, State
from tandem.jobs.work.store import JobStore


class JobTracking:
    """Jobs of all kinds. `tenant` is whose jobs a caller sees: None: those of all.

    UnknownJobError for the id of a job that there is not, or that the caller does not see.
    """

    def __init__(
        self, store: JobStore, queue: QueueState, files: FileStore, logs: Callable[[], LogSource] | None = None
    ) -> None:
        """`files`: of the database of `store`. `logs`: of the cluster that runs jobs; None: this process belongs to none."""
        self._store = store
        self._queue = queue
        self._files = files
        self._logs = logs

    def page(
        self,
        tenant: str | None,
        *,
        kinds: Collection[JobKind] | None = None,
        states: Collection[State] | None = None,
        parent: str | None = None,
        after: str | None = None,
        limit: int = 20,
    ) -> wire.TandemJobList:
        """Jobs, newest first; `after`: id of the last job of the page before."""
        page = self._store.page(tenant=tenant, kinds=kinds, states=states, parent=parent, after=after, limit=limit)
        data = [job_to_wire(job) for job in page.jobs]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return wire.TandemJobList(data=data, first_id=first, last_id=last, has_more=page.has_more)

    def get(self, job_id: str, tenant: str | None) -> wire.TandemJob:
        """One job."""
        return job_to_wire(self._store.get(job_id, tenant=tenant))

    def change(self, job_id: str, tenant: str | None, action: wire.JobAction) -> wire.TandemJob:
        """Request a change; IllegalTransitionError where kind and state of the job do not allow it.

        UnknownFileError where a job that reads files is to run again and one of them is gone.
        """
        self._store.get(job_id, tenant=tenant)
        if action == "requeue":
            return job_to_wire(requeue_with_files(self._store, self._files, job_id, reason=REQUESTED))
        return job_to_wire(self._store.change(job_id, Action(action), reason=REQUESTED))

    def events(self, job_id: str, tenant: str | None, *, after: str | None, limit: int) -> wire.TandemJobEventList:
        """Events after the one with the id `after`, oldest first. JobError for an `after` that is no id."""
        job, position = self._store.get(job_id, tenant=tenant), _position(after)
        placed, _ = JobHistory(self._store, job).read(position, limit + 1)
        data = [event_to_wire(job.id, each) for each in placed[:limit]]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return wire.TandemJobEventList(data=data, first_id=first, last_id=last, has_more=len(placed) > limit)

    def event_feed(self, job_id: str, tenant: str | None, after: str | None) -> EventFeed:
        """Events after the one with the id `after`, as they happen."""
        return EventFeed(self._store, self._store.get(job_id, tenant=tenant), _position(after))

    def log_feed(self, job_id: str, tenant: str | None, *, attempt: int | None, line: int) -> LogFeed:
        """Lines of the log of an attempt, from `line` (1 is the first) on, as they are written; None: of the newest attempt."""
        self._store.get(job_id, tenant=tenant)
        return LogFeed(lambda: self._store.get(job_id, tenant=tenant), self._logs, attempt, line - 1)

    def metrics(
        self, job_id: str, tenant: str | None, *, names: Collection[str] = (), after_step: int = -1
    ) -> wire.TandemJobMetrics:
        """Metric series; `names`: of these alone, `after_step`: of later steps alone."""
        job = self._store.get(job_id, tenant=tenant)
        events = JobHistory(self._store, job).run_events()
        return wire.TandemJobMetrics(job_id=job.id, series=series_of(events, names=names, after_step=after_step))

    def lineage(self, job_id: str, tenant: str | None) -> wire.TandemLineage:
        """What a job was made from, and what was made of it."""
        return lineage_of(self._store, self._store.get(job_id, tenant=tenant))

    def queue(self, tenant: str | None) -> wire.TandemQueue:
        """Jobs and requests by state, and the jobs that wait."""
        return self._queue.read(tenant)


def _position(after: str | None) -> Position:
    return BEGINNING if after is None else Position.of(after)
