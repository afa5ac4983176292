"""Dispatcher: one leader that starts, watches and stops the jobs of a cluster, and adopts those of the leader before it.

Each round it renews its leadership and the leases of its jobs, reconciles every active job with its runner, then starts what the
decider chooses. All of its state is in the database and with the runners. It can be killed at any point: a claimed job that was
not started is started by the next leader, one that was started is found by its name, and one that ended is recorded then.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping, Sequence

from tandem.errors import IllegalTransitionError, LeaseLostError, TandemError
from tandem.jobs.dispatch import reconcile
from tandem.jobs.dispatch.chores import Chore, Chores
from tandem.jobs.dispatch.decisions import (
    AskCapacity,
    Decide,
    Expire,
    Preempt,
    Resize,
    Start,
    Wait,
    first_come_first_served,
)
from tandem.jobs.dispatch.runner import Runner
from tandem.jobs.work.leader import DISPATCHER, Leadership, Term
from tandem.jobs.work.queue import ItemQueue
from tandem.jobs.work.records import Job, Lease
from tandem.jobs.work.states import Action, is_legal
from tandem.jobs.work.store import JobStore

LEASE_S = 30.0
"""Seconds after which the jobs and the lead of a dispatcher that died go to another one."""
POLL_S, IDLE_POLLS = 1.0, 3
"""Seconds between two rounds, and how many times as long where no job waits or runs."""
SUBMITTED_POLL_S = 0.5
"""Seconds between two looks for a new job meanwhile, which only read."""

log = logging.getLogger(__name__)


class Dispatcher:
    """The dispatcher of one process; of several on one database, one leads and the others wait."""

    def __init__(
        self,
        store: JobStore,
        runners: Mapping[str, Runner],
        capacity: AskCapacity,
        *,
        decide: Decide = first_come_first_served,
        chores: Sequence[Chore] = (),
        lease_s: float = LEASE_S,
    ) -> None:
        """`runners`: by the name that jobs give; a job that names another one fails. `capacity`: of the cluster, now;
        asked where a decision needs it. `chores`: done while this process leads.
        """
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._store = store
        self._leadership = Leadership(store.url, identity=store.identity, clock=store.clock)
        self._queue = ItemQueue(store.url, identity=store.identity, clock=store.clock)
        self._runners = runners
        self._capacity = capacity
        self._decide = decide
        self._chores = Chores(chores)
        self._lease_s = lease_s
        self._term: Term | None = None
        self._held: dict[str, Lease] = {}
        """Leases of this process, by the ids of their jobs."""
        self._has_jobs = True
        """Whether any job waited or ran in the last round."""
        self._renewed_at = 0.0
        """Monotonic clock."""

    def run(self, stop: threading.Event, *, poll_s: float = POLL_S) -> None:
        """Rounds until `stop` is set; then the lead goes to another process at once, and the dispatcher's connections are closed.

        Jobs go on running.
        """
        try:
            self._rounds(stop, poll_s)
            self.resign()
        finally:
            self.close()

    def _rounds(self, stop: threading.Event, poll_s: float) -> None:
        while not stop.is_set():
            try:
                self.round()
            except LeaseLostError as error:
                log.warning("The lead was lost: %s", error)
                self._forget()
            except TandemError as error:
                # The database or the cluster is away: later it may answer.
                log.warning("%s", error)
            except Exception:
                # One job or a part of the cluster that is not understood must not end dispatching.
                log.exception("A round of the dispatcher failed. The next one follows.")
            self._wait(stop, poll_s)

    def _wait(self, stop: threading.Event, poll_s: float) -> None:
        """Wait until the next round; where nothing was to be done, longer, and until a job is submitted."""
        if self._has_jobs:
            stop.wait(poll_s)
            return
        end = time.monotonic() + IDLE_POLLS * poll_s
        while not stop.wait(min(SUBMITTED_POLL_S, max(0.0, end - time.monotonic()))) and time.monotonic() < end:
            # A round would write; where the database is away, it says so.
            with contextlib.suppress(TandemError):
                if self._store.has_queued():
                    return

    def resign(self) -> None:
        """Let another process lead at once."""
        if self._term is not None:
            self._leadership.resign(self._term)
        self._forget()

    def close(self) -> None:
        """Close the dispatcher's own connections; the store stays open."""
        self._leadership.close()
        self._queue.close()

    def round(self) -> bool:
        """One round; False while another process leads. LeaseLostError where another one has taken the lead meanwhile."""
        if not self._lead():
            return False
        self._store.expire_overdue()
        # Items of workers that are gone, and those that nobody claimed in time.
        self._queue.reclaim()
        self._queue.expire_overdue()
        for job in self._adopt(self._store.active()):
            self._keep_leases()
            self._reconcile(job)
        self._carry_out_decisions()
        self._keep_leases()
        if self._term is not None:
            self._chores.run(self._term)
        return True

    def _lead(self) -> bool:
        term = self._leadership.acquire(DISPATCHER, self.owner, self._lease_s)
        if term != self._term:
            self._held.clear()
        self._term = term
        if term is None:
            return False
        self._renewed_at = time.monotonic()
        if self._held:
            for lost in self._store.renew(list(self._held.values()), self._lease_s).lost:
                self._held.pop(lost.id, None)
        return True

    def _keep_leases(self) -> None:
        """Renew in good time within a round: calls of runners may take seconds each."""
        if time.monotonic() - self._renewed_at > self._lease_s / 3 and not self._lead():
            raise LeaseLostError(f"{self.owner} was too slow to renew its lead. It waits until it leads again.")

    def _forget(self) -> None:
        self._term = None
        self._held.clear()

    def _adopt(self, active: list[Job]) -> list[Job]:
        """Active jobs, each with a lease of this process: those of others are taken over."""
        adopted = []
        for job in active:
            if job.lease is not None and self._held.get(job.id) == job.lease:
                adopted.append(job)
            elif (taken := self._store.take_over(job.id, self.owner, self._lease_s, term=self._term)) is not None:
                self._hold(taken)
                adopted.append(taken)
        return adopted

    def _hold(self, job: Job) -> None:
        assert job.lease is not None
        self._held[job.id] = job.lease

    def _reconcile(self, job: Job) -> None:
        """Take the next step of one job. What its runner or its lease refuses delays no other job."""
        lease = self._held[job.id]
        try:
            runner = self._runners.get(job.runner)
            if runner is None:
                known = ", ".join(sorted(self._runners)) or "none"
                self._store.fail(lease, f"There is no runner {job.runner!r}; known: {known}.", retryable=False)
                return
            handle = job.handle or runner.find(job)
            status = None if handle is None else runner.state(handle)
            self._take(reconcile.next_step(job, handle, status), job, lease, runner)
        except LeaseLostError as error:
            log.warning("Job %s: %s", job.id, error)
            self._held.pop(job.id, None)
        except TandemError as error:
            log.warning("Job %s: %s It is tried again in the next round.", job.id, error)
        except Exception:
            log.exception("Job %s: its runner %s is at fault; it is asked again in the next round.", job.id, job.runner)

    def _take(self, step: reconcile.Step | None, job: Job, lease: Lease, runner: Runner) -> None:
        match step:
            case reconcile.StartRun():
                self._start(job, lease, runner)
            case reconcile.RecordStarted(handle=handle):
                self._store.started(lease, handle)
            case reconcile.RecordFinished(result=result):
                self._store.finish(lease, result)
            case reconcile.RecordFailed(error=error, retryable=retryable, result=result):
                self._store.fail(lease, error, retryable=retryable, result=result)
            case reconcile.StopRun():
                runner.stop(job)
            case reconcile.AbandonRun():
                runner.stop(job)
                self._store.stopped(lease)
            case reconcile.PauseStopped():
                self._store.pause(job.id, reason=f"{job.run_name} was stopped from outside")
                self._store.stopped(lease)
            case reconcile.RecordStopped(result=result):
                self._store.stopped(lease, result)
            case None:
                return

    def _start(self, job: Job, lease: Lease, runner: Runner) -> None:
        """Start an attempt; where that fails and nothing was started, the attempt has failed."""
        try:
            handle = runner.start(job)
        except TandemError as error:
            if runner.find(job) is None:
                runner.stop(job)
                self._store.fail(lease, f"It could not be started: {error}")
                return
            raise
        self._store.started(lease, handle)

    def _carry_out_decisions(self) -> None:
        waiting, running = self._store.waiting(), self._store.active()
        by_id = {job.id: job for job in (*waiting, *running)}
        self._has_jobs = bool(by_id)
        reasons: dict[str, str] = {}
        for decision in self._decide(waiting, running, functools.cache(self._capacity), self._store.now()):
            match decision:
                case Start(job_id=job_id, workers=workers):
                    self._keep_leases()
                    claimed = self._store.claim(job_id, self.owner, self._lease_s, workers=workers, term=self._term)
                    if claimed is not None:
                        self._hold(claimed)
                        self._reconcile(claimed)
                case Wait(job_id=job_id, reason=reason):
                    if by_id[job_id].reason != reason:
                        reasons[job_id] = reason
                case _:
                    self._request(decision, by_id[decision.job_id])
        if reasons:
            self._store.explain(reasons)

    def _request(self, decision: Preempt | Resize | Expire, job: Job) -> None:
        """Ask a run to leave. One that has ended meanwhile is left alone."""
        action = Action.EXPIRE if isinstance(decision, Expire) else Action.PREEMPT
        if not is_legal(job.kind, job.state, action):
            return
        try:
            match decision:
                case Preempt(reason=reason):
                    self._store.preempt(job.id, reason=reason, term=self._term, attempt=job.attempt)
                case Resize(reason=reason, workers=workers):
                    self._store.preempt(job.id, reason=reason, workers=workers, term=self._term, attempt=job.attempt)
                case Expire(reason=reason):
                    self._store.expire(job.id, reason=reason, term=self._term, attempt=job.attempt)
        except IllegalTransitionError as error:
            log.info("Job %s: %s", job.id, error)
