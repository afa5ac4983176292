"""The schedulers that bench/scheduling/scheduler_sim.py compares: Tandem's, and models of what people would otherwise use."""

from __future__ import annotations

from bisect import insort
from typing import Protocol

from tandem.jobs.scheduling import (
    ClusterState,
    Decision,
    Hold,
    Job,
    Node,
    Policy,
    Preempt,
    Resources,
    ServingDemand,
    Start,
    Tenant,
    decide,
)
from tandem.jobs.scheduling.pool import Pool


class Scheduler(Protocol):
    """What the simulation asks of a scheduler. Decisions count as carried out when they are returned."""

    def submit(self, job: Job, now: float) -> None:
        """A job waits."""

    def finished(self, job_id: str, now: float) -> None:
        """A run ended for good."""

    def preempted(self, job_id: str, now: float) -> bool:
        """A run that was told to stop for others has stopped. False if its time limit is used up, so that it has ended."""

    def resized(self, job_id: str, now: float) -> None:
        """A run that was told to shrink has done so."""

    def set_serving(self, demand: ServingDemand, now: float) -> None:
        """A model needs so many replicas."""

    def decide(self, now: float) -> list[Decision]:
        """Decisions of now, without holds."""


class Tandem:
    """`tandem.jobs.scheduling`, as a dispatcher would drive it."""

    def __init__(self, nodes: list[Node], tenants: list[Tenant], policy: Policy | None = None) -> None:
        self.state = ClusterState(policy, tenants, nodes)

    def submit(self, job: Job, now: float) -> None:
        self.state.submit(job, now)

    def finished(self, job_id: str, now: float) -> None:
        self.state.finished(job_id, now)

    def preempted(self, job_id: str, now: float) -> bool:
        return self.state.preempted(job_id, now) is not None

    def resized(self, job_id: str, now: float) -> None:
        self.state.resized(job_id, now)

    def set_serving(self, demand: ServingDemand, now: float) -> None:
        self.state.set_serving(demand, now)

    def decide(self, now: float) -> list[Decision]:
        decisions = decide(self.state, now)
        for decision in decisions:
            self.state.apply(decision, now)
        return [decision for decision in decisions if not isinstance(decision, Hold)]


class Fifo:
    """One queue in the order of submission; the first job that does not fit holds up all others. No tenants, no preemption."""

    def __init__(self, nodes: list[Node], tenants: list[Tenant]) -> None:
        self._free = Pool.of((node.id, Resources(node.cpus, node.gpus)) for node in nodes)
        self._waiting: list[tuple[float, str]] = []
        self._jobs: dict[str, Job] = {}
        self._running: dict[str, Start] = {}

    def submit(self, job: Job, now: float) -> None:
        self._jobs[job.id] = job
        insort(self._waiting, (job.submitted_s, job.id))

    def finished(self, job_id: str, now: float) -> None:
        self._free.give_all(self._running.pop(job_id).placement, self._jobs.pop(job_id).worker)

    def decide(self, now: float) -> list[Decision]:
        starts: list[Decision] = []
        while self._waiting:
            job = self._jobs[self._waiting[0][1]]
            start = place(self._free, job)
            if start is None:
                break
            del self._waiting[0]
            self._running[job.id] = start
            starts.append(start)
        return starts

    def preempted(self, job_id: str, now: float) -> bool:
        raise NotImplementedError

    def resized(self, job_id: str, now: float) -> None:
        raise NotImplementedError

    def set_serving(self, demand: ServingDemand, now: float) -> None:
        raise NotImplementedError


class KueueLike:
    """A model of Kueue: a ClusterQueue for each tenant, all in one cohort.

    - Nominal quota: the tenant's weighted share; no borrowing limit. Order in a queue: priority, then time.
    - A cycle takes the head of each queue: those that fit the nominal quota first, then by priority and time. StrictFIFO: a
      head that is not admitted holds up its queue; BestEffortFIFO: the next of the queue is tried.
    - `reclaimWithinCohort: Any`, `withinClusterQueue: LowerPriority`: a job within its nominal quota preempts those of queues
      that borrow, and lower ones of its own queue; lower priorities and later starts first, none that is not needed.
    - While a job waits for those that it preempts, no other starts by borrowing: it would be preempted next.
    - More than Kueue does by default: a job is admitted only where all of its workers fit on nodes, packed as Tandem packs them.
    """

    def __init__(self, nodes: list[Node], tenants: list[Tenant], *, strict: bool) -> None:
        self._strict = strict
        self._free = Pool.of((node.id, Resources(node.cpus, node.gpus)) for node in nodes)
        total, weights = self._free.total.gpus, sum(tenant.weight for tenant in tenants)
        self._nominal = {tenant.name: total * tenant.weight / weights for tenant in tenants}
        self._used = dict.fromkeys(self._nominal, 0.0)
        self._queues: dict[str, list[tuple[int, float, str]]] = {name: [] for name in self._nominal}
        self._jobs: dict[str, Job] = {}
        self._running: dict[str, tuple[float, Start]] = {}
        self._stopping: set[str] = set()
        self._preemptors: set[str] = set()
        """Jobs that wait for others to stop."""

    def submit(self, job: Job, now: float) -> None:
        self._jobs[job.id] = job
        insort(self._queues[job.tenant], (-job.priority, job.submitted_s, job.id))

    def finished(self, job_id: str, now: float) -> None:
        job, (_, start) = self._jobs.pop(job_id), self._running.pop(job_id)
        self._free.give_all(start.placement, job.worker)
        self._used[job.tenant] -= gpus(job)
        self._stopping.discard(job_id)

    def preempted(self, job_id: str, now: float) -> bool:
        job = self._jobs[job_id]
        self.finished(job_id, now)
        self.submit(job, now)
        return True

    def resized(self, job_id: str, now: float) -> None:
        raise NotImplementedError

    def set_serving(self, demand: ServingDemand, now: float) -> None:
        raise NotImplementedError

    def decide(self, now: float) -> list[Decision]:
        decisions: list[Decision] = []
        if not self._stopping:
            # Whoever still waits has lost its room to a job that its quota covers, too, and preempts again.
            self._preemptors.clear()
        places = dict.fromkeys(self._queues, 0)
        refused: set[tuple[str, float, int]] = set()
        while True:
            heads = [
                (self._borrows(self._jobs[queue[places[name]][2]]), queue[places[name]], name)
                for name, queue in self._queues.items()
                if places[name] < len(queue)
            ]
            if not heads:
                return decisions
            for _, entry, name in sorted(heads):
                job = self._jobs[entry[2]]
                # A job like one that was refused in this decision is refused as well.
                kind = (name, gpus(job), job.priority)
                waits = kind in refused or (bool(self._preemptors - {job.id}) and self._borrows(job))
                start = None if waits else place(self._free, job)
                if start is not None:
                    decisions.append(start)
                    self._preemptors.discard(job.id)
                    self._running[job.id] = (now, start)
                    self._used[name] += gpus(job)
                    del self._queues[name][places[name]]
                    continue
                if kind not in refused:
                    decisions += self._preempt(job)
                    refused.add(kind)
                places[name] = len(self._queues[name]) if self._strict else places[name] + 1

    def _borrows(self, job: Job) -> bool:
        return self._used[job.tenant] + gpus(job) > self._nominal[job.tenant] + 1e-6

    def _preempt(self, job: Job) -> list[Decision]:
        if self._borrows(job):
            return []
        pool, used = self._free.copy(), dict(self._used)
        for job_id in self._stopping:
            pool.give_all(self._running[job_id][1].placement, self._jobs[job_id].worker)
            used[self._jobs[job_id].tenant] -= gpus(self._jobs[job_id])
        if pool.slots(job.worker) >= job.max_workers:
            return []
        borrowing = {name for name, gpus_used in used.items() if gpus_used > self._nominal[name] and name != job.tenant}
        order = sorted(
            (other.tenant == job.tenant, other.priority, -self._running[other.id][0], other.id)
            for other in (self._jobs[job_id] for job_id in self._running if job_id not in self._stopping)
            if other.tenant in borrowing or (other.tenant == job.tenant and other.priority < job.priority)
        )
        if pool.total.gpus + sum(gpus(self._jobs[entry[3]]) for entry in order) < gpus(job):
            return []
        victims: list[str] = []
        for is_own, _, _, job_id in order:
            other = self._jobs[job_id]
            if not is_own and used[other.tenant] <= self._nominal[other.tenant]:
                continue
            victims.append(job_id)
            used[other.tenant] -= gpus(other)
            pool.give_all(self._running[job_id][1].placement, other.worker)
            if pool.slots(job.worker) >= job.max_workers:
                break
        else:
            return []
        for job_id in victims[:-1]:
            placement, worker = self._running[job_id][1].placement, self._jobs[job_id].worker
            pool.take_all(placement, worker)
            if pool.slots(job.worker) >= job.max_workers:
                victims.remove(job_id)
            else:
                pool.give_all(placement, worker)
        self._stopping |= set(victims)
        self._preemptors.add(job.id)
        return [Preempt(job_id=job_id, reason=f"preempted for {job.id}") for job_id in victims]


def gpus(job: Job) -> float:
    """GPUs of a job with all of its workers."""
    return job.worker.gpus * job.max_workers


def place(free: Pool, job: Job) -> Start | None:
    """Start a job with all of its workers, if these fit; takes them from `free`."""
    units = free.pack(job.worker, job.max_workers)
    if units is None:
        return None
    placement = tuple(sorted(units.items()))
    free.take_all(placement, job.worker)
    return Start(job_id=job.id, placement=placement, reason="fits")
