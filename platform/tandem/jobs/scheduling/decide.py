"""One scheduling decision: what starts, waits, shrinks, grows, stops and gives way, for a state at a time. Pure.

The order of work: time limits; serving; waiting jobs in the order of `_rank`, with backfill behind the first that does not fit;
growth of elastic runs into what nobody waits for.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from tandem.jobs.scheduling import reasons
from tandem.jobs.scheduling.claims import victims_for
from tandem.jobs.scheduling.decisions import Decision, Grow, Hold, Start, Stop
from tandem.jobs.scheduling.queues import Cursor, Shape
from tandem.jobs.scheduling.records import Job, Placement, Run
from tandem.jobs.scheduling.reservation import Release, Reservation, releases, reserve
from tandem.jobs.scheduling.resources import Resources
from tandem.jobs.scheduling.serving import plan_serving
from tandem.jobs.scheduling.state import ClusterState

STARVED, WITHIN_QUOTA, BORROWING = 0, 1, 2
"""Bands of the tenants' next jobs; lower first."""
NOTHING = Resources()


def decide(state: ClusterState, now: float) -> list[Decision]:
    """The decisions at a time. The state is unchanged until the driver applies them.

    Each tenant's first waiting job that does not start has a `Hold`; `explain.explain` tells the reason of any other.
    """
    return SchedulingPass(state, now).run()


@dataclass(slots=True)
class _Placed:
    """A job that starts."""

    job: Job
    units: dict[str, int]
    """Groups of workers on each node."""
    reason: str

    @property
    def placement(self) -> Placement:
        return tuple(sorted((node, units * self.job.workers_per_node) for node, units in self.units.items()))


class SchedulingPass:
    """Working copy of the state for one decision. With `about`, the id of a waiting job, that job has a `Hold` as well."""

    def __init__(self, state: ClusterState, now: float, about: str | None = None) -> None:
        self._about = about
        self._state = state
        self._policy = state.policy
        self._now = now
        self._free = state.free.copy()
        self._reservation: Reservation | None = None
        self._placed: dict[str, _Placed] = {}
        self._starting: dict[str, Resources] = {}
        """Resources of the jobs that start, by tenant."""
        self._quotas = {tenant: state.quota(tenant) for tenant in state.accounts}
        self._shares: dict[str, float] = {}
        """Weighted dominant shares, with the jobs that start."""
        self._giving_way: dict[str, Placement] = {}
        """Placement that each run keeps which is told to stop or shrink."""
        self._decisions: list[Decision] = []
        self._holds: dict[str, Hold] = {}
        """By job; of each tenant's first job that waits."""
        self._held_back: set[str] = set()
        """Tenants with such a job."""

    def run(self) -> list[Decision]:
        """The decisions; to be called once."""
        self._stop_overdue()
        serving = plan_serving(self._state, self._free, self._now)
        self._giving_way.update(serving.giving_way)
        self._decisions += serving.decisions
        self._start_jobs()
        if self._reservation is None:
            self._grow()
        starts = [
            Start(job_id=placed.job.id, placement=placed.placement, reason=placed.reason)
            for placed in self._placed.values()
        ]
        return [*self._decisions, *starts, *self._holds.values()]

    def _stop_overdue(self) -> None:
        for end_s, job_id in self._state.ends:
            if end_s > self._now:
                return
            run = self._state.runs[job_id]
            if run.job.time_limit_s is not None and not run.is_stopping:
                self._decisions.append(Stop(job_id=job_id, reason=reasons.over_limit(run.job)))
                self._giving_way[job_id] = ()

    # Waiting jobs

    def _start_jobs(self) -> None:
        cursors = {name: queue.cursor() for name, queue in self._state.queues.items() if len(queue)}
        heap = [(self._rank(name, cursor), name) for name, cursor in cursors.items()]
        heapq.heapify(heap)
        examined = 0
        while heap and examined < self._policy.backfill_depth:
            rank, tenant = heapq.heappop(heap)
            cursor = cursors[tenant]
            following = cursor.peek()
            if following is None:
                continue
            job, shape = following
            examined += self._reservation is not None
            if not self._may_start(job, shape):
                cursor.skip_shape()
            else:
                if not self._start(job, shape) and self._reservation is None:
                    self._block(job, shape, int(rank[0]))
                cursor.skip_job()
            heapq.heappush(heap, (self._rank(tenant, cursor), tenant))

    def _held(self, tenant: str) -> Resources:
        """What a tenant holds, with the jobs that start."""
        return self._state.accounts[tenant].held + self._starting.get(tenant, NOTHING)

    def _add(self, tenant: str, amount: Resources) -> None:
        self._starting[tenant] = self._starting.get(tenant, NOTHING) + amount
        self._shares.pop(tenant, None)

    def _weighted_share(self, tenant: str) -> float:
        share = self._shares.get(tenant)
        if share is None:
            account = self._state.accounts[tenant]
            share = account.weighted_share(self._state.total, self._now, self._starting.get(tenant))
            self._shares[tenant] = share
        return share

    def _is_within_quota(self, job: Job) -> bool:
        return (self._held(job.tenant) + job.needs()).fits_in(self._quotas[job.tenant])

    def _rank(self, tenant: str, cursor: Cursor) -> tuple[float, ...]:
        """Order among tenants' next jobs: starved ones; then by quota, priority, weighted dominant share, and age."""
        following = cursor.peek()
        if following is None:
            return (BORROWING + 1,)
        state, now, job = self._state, self._now, following[0]
        queue = state.queues[tenant]
        if now - queue.head_since_s >= self._policy.starvation_s and queue.is_head(job):
            return (STARVED, queue.head_since_s)
        if state.reserved is not None and state.reserved[0] == job.id:
            # Backfill of its own tenant's jobs must not cost it its place.
            return (state.reserved[1], -job.priority, -1.0)
        band = WITHIN_QUOTA if self._is_within_quota(job) else BORROWING
        return (band, -job.priority, self._weighted_share(tenant), queue.position(job).aged_s)

    def _may_start(self, job: Job, shape: Shape) -> bool:
        """Whether a job, and so any of its shape, may start in this pass; notes the reason if it may not."""
        tenant, reservation = self._state.accounts[job.tenant].tenant, self._reservation
        if self._state.capacity.slots(shape.unit) < shape.units:
            self._hold(job, reasons.too_large, self._state.capacity, job)
            return False
        held = self._held(job.tenant)
        if not (held + job.needs()).fits_in(tenant.limit):
            self._hold(job, reasons.over_tenant_limit, tenant, held, job)
            return False
        if reservation is None:
            return True
        if job.tenant == reservation.job.tenant:
            # The tenant's limit must leave room for the first job as well.
            held = held + reservation.job.needs()
            if not (held + job.needs()).fits_in(tenant.limit):
                self._hold(job, reasons.over_tenant_limit, tenant, held, job)
                return False
        if self._free.slots(shape.unit) < shape.units:
            self._hold(job, reasons.behind, self._free, job, reservation.job)
            return False
        if reservation.lasting.slots(shape.unit) >= shape.units:
            return True
        if self._now + shape.min_expected_s >= reservation.start_s:
            self._hold_back(job, reservation)
            return False
        return True

    def _start(self, job: Job, shape: Shape) -> bool:
        """Start a job if it fits and delays no reservation."""
        reservation, pool = self._reservation, self._free
        end_s = self._now + job.expected_s(self._policy)
        outlasts = reservation is not None and end_s > reservation.start_s
        if reservation is not None and outlasts:
            pool = reservation.lasting
        units = pool.pack(shape.unit, shape.units)
        if units is None:
            if reservation is not None:
                self._hold_back(job, reservation)
            return False
        for node_id, count in units.items():
            self._free.take(node_id, shape.unit * count)
            if reservation is not None:
                reservation.take(node_id, shape.unit * count, self._free, outlasts=outlasts)
        reason = "is next" if reservation is None else reasons.beside(job, reservation.job)
        self._placed[job.id] = _Placed(job, units, reason)
        self._add(job.tenant, job.needs())
        return True

    def _block(self, job: Job, shape: Shape, band: int) -> None:
        """Reserve resources for the first job that does not fit; others give way to it where it has a right to that."""
        waits_until_s = self._now + self._policy.preempt_after_s
        reservation = self._reserve(job, shape)
        if reservation is None or reservation.start_s > waits_until_s:
            victims = victims_for(
                self._state, self._free, job, self._giving_way, self._now, is_within_quota=self._is_within_quota(job)
            )
            for victim in victims:
                self._giving_way[victim.run.job.id] = victim.keep
                self._decisions.append(victim.decision(reasons.gives_way(victim.run.job, job), for_job=job.id))
            if victims:
                reservation = self._reserve(job, shape)
        if reservation is None:
            self._hold(job, reasons.no_end_in_sight, self._free, job)
            return
        self._reservation = reservation
        self._hold(job, reasons.waits, self._free, job, reservation.start_s, expected_s=reservation.start_s, band=band)

    def _reserve(self, job: Job, shape: Shape) -> Reservation | None:
        starting: list[Release] = [
            (self._now + placed.job.expected_s(self._policy), placed.placement, placed.job.worker)
            for placed in self._placed.values()
        ]
        ordered = releases(self._state, self._now, self._giving_way, starting)
        return reserve(self._free, ordered, job, shape, self._now)

    def _hold(
        self,
        job: Job,
        reason: Callable[..., str],
        *arguments: object,
        expected_s: float | None = None,
        band: int | None = None,
    ) -> None:
        if job.tenant not in self._held_back or (job.id == self._about and job.id not in self._holds):
            self._held_back.add(job.tenant)
            self._holds[job.id] = Hold(job_id=job.id, reason=reason(*arguments), expected_s=expected_s, band=band)

    def _hold_back(self, job: Job, reservation: Reservation) -> None:
        self._hold(job, reasons.would_delay, job, self._policy, reservation.job, reservation.start_s)

    # Elastic runs

    def _grow(self) -> None:
        """Give elastic runs what no waiting job can use, the tenants with the smallest share first."""
        now, settled_s = self._now, self._policy.min_run_s
        growing: list[Run | _Placed] = [placed for placed in self._placed.values() if placed.job.is_elastic]
        for job_id in self._state.elastic:
            run = self._state.runs[job_id]
            is_changing = run.shrinking_to is not None or run.job.id in self._giving_way
            is_settled = now - run.changed_s >= settled_s and run.ends_s(self._policy) - now > settled_s
            if run.workers < run.job.max_workers and is_settled and not is_changing:
                growing.append(run)
        growing.sort(key=lambda each: (self._weighted_share(each.job.tenant), each.job.id))
        for each in growing:
            added = self._room(each.job, sum(workers for _, workers in each.placement))
            if not added:
                continue
            self._add(each.job.tenant, each.job.unit * sum(added.values()))
            for node_id, count in added.items():
                self._free.take(node_id, each.job.unit * count)
            if isinstance(each, _Placed):
                each.units = {node: each.units.get(node, 0) + added.get(node, 0) for node in {**each.units, **added}}
            else:
                workers = dict(each.placement)
                for node_id, count in added.items():
                    workers[node_id] = workers.get(node_id, 0) + count * each.job.workers_per_node
                reason = "takes what no job waits for"
                self._decisions.append(
                    Grow(job_id=each.job.id, placement=tuple(sorted(workers.items())), reason=reason)
                )

    def _room(self, job: Job, workers: int) -> dict[str, int]:
        """Groups of workers on each node that a run with `workers` workers can add; empty: none."""
        limit = self._state.accounts[job.tenant].tenant.limit
        for count in reversed(job.worker_counts):
            if count <= workers:
                break
            more = job.worker * (count - workers)
            if (self._held(job.tenant) + more).fits_in(limit):
                units = self._free.pack(job.unit, (count - workers) // job.workers_per_node)
                if units:
                    return units
        return {}
