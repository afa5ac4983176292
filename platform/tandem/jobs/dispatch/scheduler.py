"""Scheduler of the dispatcher: follows the store and the cluster in one `ClusterState`, and decides with it.

Each round it brings the state in line with the jobs that wait and run, whatever happened since the last one, so that a new
dispatcher starts with an empty state. Only past use (fair shares), reservations and resizes under way are kept from round to
round; a resize that its dispatcher did not live to see goes on as a preemption.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime

from tandem.config import SchedulingConfig
from tandem.errors import ConfigError
from tandem.jobs.dispatch import decisions as actions
from tandem.jobs.dispatch.history import RunHistory
from tandem.jobs.dispatch.placements import locate, nodes_for_jobs, used_pool
from tandem.jobs.dispatch.requests import request_of, worker_of
from tandem.jobs.scheduling import ClusterState, Grow, Hold, Node, Preempt, Run, Shrink, Start, Stop, decide
from tandem.jobs.scheduling import records as scheduling
from tandem.jobs.scheduling.from_config import policy, tenants
from tandem.jobs.scheduling.pool import Pool
from tandem.jobs.scheduling.reasons import in_line
from tandem.jobs.work.records import Job
from tandem.jobs.work.states import State

EXPLAINED_JOBS = 100
"""Jobs of each tenant, from its first on, whose place in the queue is told as the reason for which they wait."""

log = logging.getLogger(__name__)


class Scheduler:
    """A `decisions.Decide` with memory; one for each dispatcher. Jobs that need neither CPUs nor GPUs start at once."""

    def __init__(self, config: SchedulingConfig, history: Callable[[str], RunHistory]) -> None:
        """`history`: of the attempts of a job, by its id."""
        self.state = ClusterState(policy(config), tenants(config))
        self._config = config
        self._history = history
        self._now_s = 0.0
        self._requests: dict[str, tuple[int, scheduling.Job]] = {}
        """Requests of jobs, with the number of the job's event up to which they are made."""
        self._queued: dict[str, scheduling.Job] = {}
        self._resizing: dict[str, int] = {}
        """Workers of runs that leave to go on with another number of them."""
        self._attempts: dict[str, int] = {}
        """The attempt that each run is."""
        self._nodes: list[Node] | None = None

    def __call__(
        self, waiting: Sequence[Job], running: Sequence[Job], ask_capacity: actions.AskCapacity, now: datetime
    ) -> list[actions.Decision]:
        """See `decisions.Decide`."""
        # The database's clock may be set back.
        self._now_s = max(self._now_s, now.timestamp())
        active = {job.id: job for job in running}
        queued = {job.id: job for job in waiting if job.id not in active}
        self._remove_others(active, queued)
        if all(worker_of(job).is_empty for job in (*active.values(), *queued.values())):
            # No job holds or needs any of the cluster: nothing can give way to serving either.
            self.state.replace_serving(())
            return list(self._follow_queue(queued))
        capacity = ask_capacity()
        self._follow_runs(active, capacity)
        found = list(self._follow_queue(queued))
        self.state.replace_serving(capacity.pending_replicas)
        self._set_nodes(capacity)
        return [*found, *self._decide()]

    # ---- following ----

    def _remove_others(self, active: dict[str, Job], queued: dict[str, Job]) -> None:
        """Remove what does not run, or does not wait, any more."""
        for job_id in list(self.state.runs):
            if job_id not in active and not (job_id in queued and job_id in self._resizing):
                self.state.finished(job_id, self._now_s)
                self._resizing.pop(job_id, None)
                self._attempts.pop(job_id, None)
        for job_id in list(self._queued):
            if job_id not in queued:
                request = self._queued.pop(job_id)
                self.state.cancel(request.tenant, job_id, self._now_s)
        self._requests = {
            job_id: request for job_id, request in self._requests.items() if job_id in active or job_id in queued
        }

    def _follow_runs(self, active: dict[str, Job], capacity: actions.Capacity) -> None:
        pools = _Pools(capacity, self.state)
        for job in active.values():
            if worker_of(job).is_empty:
                continue
            if self._attempts.get(job.id, job.attempt) != job.attempt and job.id not in self._resizing:
                # Ended and started again by another dispatcher, while this one did not lead.
                self.state.finished(job.id, self._now_s)
            if job.id not in self.state.runs:
                self._adopt(job, pools)
            self._attempts[job.id] = job.attempt
            self._follow_run(job, pools)

    def _adopt(self, job: Job, pools: _Pools) -> None:
        """Take over a run that another dispatcher started."""
        history = self._history(job.id)
        started_s = self._now_s if history.started_s is None else min(history.started_s, self._now_s)
        request = _lenient_request(job, history, self._config)
        placement = locate(request.worker, _workers(job), pools.used, pools.free)
        run = Run(job=request, placement=placement, started_s=started_s, changed_s=started_s, checkpoint_s=started_s)
        self.state.adopt(run, self._now_s)

    def _follow_run(self, job: Job, pools: _Pools) -> None:
        run = self.state.runs[job.id]
        if job.state is State.PREEMPTING and job.id in self._resizing:
            return
        self._resizing.pop(job.id, None)
        placement = run.placement
        if run.workers != _workers(job):
            placement = locate(run.job.worker, _workers(job), pools.used, pools.free)
        leaves = () if job.state.leaving else None
        if (placement, leaves) != (run.placement, run.shrinking_to):
            self.state.correct(job.id, placement=placement, shrinking_to=leaves, now=self._now_s)

    def _follow_queue(self, queued: dict[str, Job]) -> Iterator[actions.Decision]:
        """Bring the queues in line; yields what needs no decision of the scheduler."""
        for job in queued.values():
            if worker_of(job).is_empty:
                yield actions.Start(job_id=job.id, workers=job.resources.min_workers)
            elif job.id in self.state.runs:
                yield self._go_on(job.id)
            else:
                try:
                    self._queue(job.id, self._request(job))
                except ConfigError as error:
                    yield actions.Wait(job_id=job.id, reason=str(error))

    def _go_on(self, job_id: str) -> actions.Start:
        """Start a run again that has left to be resized; its room has been kept."""
        if self.state.runs[job_id].shrinking_to:
            self.state.resized(job_id, self._now_s)
        return actions.Start(job_id=job_id, workers=self.state.runs[job_id].workers)

    def _queue(self, job_id: str, request: scheduling.Job) -> None:
        known = self._queued.get(job_id)
        if known == request:
            return
        if known is not None:
            self.state.cancel(known.tenant, job_id, self._now_s)
        self._queued[job_id] = request
        self.state.submit(request, self._now_s)

    def _request(self, job: Job) -> scheduling.Job:
        version, request = self._requests.get(job.id, (-1, None))
        if request is None or version != job.last_event:
            history = self._history(job.id) if job.attempt else RunHistory()
            request = request_of(job, history, self._config)
            self._requests[job.id] = job.last_event, request
        return request

    def _set_nodes(self, capacity: actions.Capacity) -> None:
        nodes = nodes_for_jobs(capacity.nodes, self.state.runs.values())
        if nodes != self._nodes:
            self.state.set_nodes(nodes)
            self._nodes = nodes

    # ---- deciding ----

    def _decide(self) -> Iterator[actions.Decision]:
        reasons: dict[str, str] = {}
        for decision in decide(self.state, self._now_s):
            if isinstance(decision, Preempt | Shrink) and decision.for_job:
                # The reason names no job of another tenant.
                log.info("Job %s gives way to job %s.", decision.job_id, decision.for_job)
            match decision:
                case Start(job_id=job_id, placement=placement):
                    del self._queued[job_id]
                    yield actions.Start(job_id=job_id, workers=sum(workers for _, workers in placement))
                case Preempt(job_id=job_id, reason=reason):
                    yield actions.Preempt(job_id=job_id, reason=reason)
                case Shrink(job_id=job_id, placement=placement) | Grow(job_id=job_id, placement=placement):
                    workers = self._resizing[job_id] = sum(workers for _, workers in placement)
                    yield actions.Resize(job_id=job_id, workers=workers, reason=decision.reason)
                case Stop(job_id=job_id, reason=reason):
                    yield actions.Expire(job_id=job_id, reason=reason)
                case Hold(job_id=job_id, reason=reason):
                    reasons[job_id] = reason
                case _:
                    # Serve places replicas itself as soon as there is room; the next decision keeps it for them again.
                    continue
            self.state.apply(decision, self._now_s)
        yield from self._reasons(reasons)

    def _reasons(self, held: dict[str, str]) -> Iterator[actions.Wait]:
        """Why the first jobs of each tenant wait."""
        for tenant, queue in self.state.queues.items():
            first = queue.head()
            for ahead, job in enumerate(queue.jobs()):
                if ahead == EXPLAINED_JOBS:
                    break
                reason = held.get(job.id)
                if reason is None:
                    reason = in_line(ahead, tenant)
                    if first is not None and first.id in held:
                        # Not its reason: each change of that would be written to all rows behind it.
                        reason += f", of which {first.id} is the first"
                yield actions.Wait(job_id=job.id, reason=reason)


class _Pools:
    """What unknown work uses, and what is free, for runs that have to be located; made when they are needed."""

    def __init__(self, capacity: actions.Capacity, state: ClusterState) -> None:
        self._capacity = capacity
        self._state = state
        self._used: Pool | None = None
        self._free: Pool | None = None

    @property
    def used(self) -> Pool:
        if self._used is None:
            self._used = used_pool(self._capacity.nodes, self._state.runs.values())
        return self._used

    @property
    def free(self) -> Pool:
        if self._free is None:
            self._free = Pool.of((node.id, node.free) for node in self._capacity.nodes if node.is_placeable)
        return self._free


def _workers(job: Job) -> int:
    return job.workers or job.resources.min_workers


def _lenient_request(job: Job, history: RunHistory, config: SchedulingConfig) -> scheduling.Job:
    """The request of a job that runs already, also where the config of today would refuse it."""
    try:
        return request_of(job, history, config)
    except ConfigError:
        return scheduling.Job(
            id=job.id,
            tenant=job.tenant,
            worker=worker_of(job),
            worker_counts=(_workers(job),),
            priority=config.level(None) - job.priority,
            submitted_s=job.created_at.timestamp(),
            preemptible=False,
        )
