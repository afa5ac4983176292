"""State of the cluster as the scheduler sees it, kept up to date event by event.

The driver reports what happens (jobs submitted and finished, runs resized, nodes added and lost, serving demand), applies the
decisions that it carries out, and asks `decide.decide`, which changes nothing here. Times must not go back.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import replace

from tandem.jobs.scheduling import shares
from tandem.jobs.scheduling.decisions import (
    Decision,
    Grow,
    Hold,
    Preempt,
    ReleaseReplicas,
    Shrink,
    Start,
    StartReplicas,
    Stop,
)
from tandem.jobs.scheduling.pool import Pool
from tandem.jobs.scheduling.queues import TenantQueue
from tandem.jobs.scheduling.records import Job, Node, Placement, Policy, Run, ServingDemand, ServingGrant, Tenant
from tandem.jobs.scheduling.resources import Resources


class ClusterState:
    """Nodes, tenants, waiting jobs, runs and serving."""

    def __init__(
        self, policy: Policy | None = None, tenants: Iterable[Tenant] = (), nodes: Iterable[Node] = ()
    ) -> None:
        self.policy = policy or Policy()
        self.accounts: dict[str, shares.TenantAccount] = {}
        self.queues: dict[str, TenantQueue] = {}
        self.runs: dict[str, Run] = {}
        self.elastic: set[str] = set()
        """Ids of the runs that can have different numbers of workers."""
        self.ends: list[tuple[float, str]] = []
        """Runs by the time by which they end."""
        self.reserved: tuple[str, int] | None = None
        """The job for which resources were last reserved, and the band in which it was first."""
        self.grants: dict[tuple[str, str], ServingGrant] = {}
        self.nodes: dict[str, Node] = {}
        self.capacity = Pool.of(())
        """Amounts of the nodes when nothing runs."""
        self.free = Pool.of(())
        self.total = Resources()
        self.total_weight = 0.0
        for tenant in tenants:
            self.set_tenant(tenant)
        self.set_nodes(nodes)

    # Tenants and nodes

    def set_tenant(self, tenant: Tenant) -> None:
        """Add a tenant, or change its rights."""
        account = self.accounts.get(tenant.name)
        if account is None:
            self.accounts[tenant.name] = shares.TenantAccount(tenant, self.policy.half_life_s)
            self.queues[tenant.name] = TenantQueue(self.policy)
        else:
            account.tenant = tenant
        self.total_weight = sum(each.tenant.weight for each in self.accounts.values())

    def set_nodes(self, nodes: Iterable[Node]) -> None:
        """Replace the nodes that work may be placed on. Runs on nodes that are gone stay until they are reported ended."""
        self.nodes = {node.id: node for node in nodes}
        amounts = [(node.id, Resources(node.cpus, node.gpus)) for node in self.nodes.values()]
        self.capacity, self.free = Pool.of(amounts), Pool.of(amounts)
        self.total = self.capacity.total
        for run in self.runs.values():
            self.free.take_all(run.placement, run.job.worker)
        for grant in self.grants.values():
            grant.nodes = [node_id for node_id in grant.nodes if node_id in self.nodes]
            for node_id in grant.nodes:
                self.free.take(node_id, grant.demand.replica)

    def quota(self, tenant: str) -> Resources:
        """What a tenant gets back from borrowers."""
        return shares.quota(self.accounts[tenant].tenant, self.total, self.total_weight)

    # Jobs

    def submit(self, job: Job, now: float) -> None:
        """Queue a job; a tenant that is not known gets weight 1."""
        if job.tenant not in self.accounts:
            self.set_tenant(Tenant(name=job.tenant))
        self.queues[job.tenant].add(job, now)

    def cancel(self, tenant: str, job_id: str, now: float) -> Job:
        """Take a waiting job out of the queue."""
        return self.queues[tenant].remove(job_id, now)

    def adopt(self, run: Run, now: float) -> None:
        """Take over a run that was started before, as after the scheduler's own restart."""
        if run.job.tenant not in self.accounts:
            self.set_tenant(Tenant(name=run.job.tenant))
        self._add_run(run, now)

    def correct(self, job_id: str, *, placement: Placement, shrinking_to: Placement | None, now: float) -> None:
        """Replace what is known of a run by what the driver has found: its workers, and what it is told to keep (see `Run`)."""
        run = self.runs[job_id]
        changed = replace(run, placement=placement, shrinking_to=shrinking_to)
        self.runs[job_id] = changed
        if placement != run.placement:
            self.free.give_all(run.placement, run.job.worker)
            self.free.take_all(placement, run.job.worker)
            self.accounts[run.job.tenant].add(run.job.needs(changed.workers) - run.job.needs(run.workers), now)

    def checkpointed(self, job_id: str, now: float) -> None:
        """A run wrote a checkpoint."""
        self.runs[job_id] = replace(self.runs[job_id], checkpoint_s=now)

    def resized(self, job_id: str, now: float) -> None:
        """A run that was told to shrink has done so: what it gave up is free."""
        run = self.runs[job_id]
        assert run.shrinking_to, f"{job_id} was not told to shrink"
        self._replace_placement(run, run.shrinking_to, now)

    def finished(self, job_id: str, now: float) -> Job:
        """A run ended for good."""
        run = self.runs.pop(job_id)
        self.elastic.discard(job_id)
        del self.ends[bisect_left(self.ends, (run.ends_s(self.policy), job_id))]
        self.free.give_all(run.placement, run.job.worker)
        self.accounts[run.job.tenant].add(run.job.needs(run.workers) * -1, now)
        return run.job

    def preempted(self, job_id: str, now: float) -> Job | None:
        """A run stopped after `Preempt`, or was lost with its node: it waits again where it was in the queue.

        None if its time limit is used up by now, so that it has ended.
        """
        run = self.runs[job_id]
        job = self.finished(job_id, now)
        job = replace(job, ran_s=job.ran_s + now - run.started_s, preemptions=job.preemptions + run.is_stopping)
        if job.time_limit_s is not None and job.ran_s >= job.time_limit_s:
            return None
        self.submit(job, now)
        return job

    # Serving

    def set_serving(self, demand: ServingDemand, now: float) -> None:
        """Report how many replicas a model needs; 0 for one that is not served any more."""
        grant = self.grants.get(demand.key)
        if grant is None:
            grant = self.grants[demand.key] = ServingGrant(demand)
        if grant.nodes and grant.demand.replica != demand.replica:
            raise ValueError(
                f"Replicas of {demand.model} need {demand.replica}, but {len(grant.nodes)} that need {grant.demand.replica} are "
                "there. Release these first."
            )
        grant.demand = demand
        self._note_surplus(grant, now)

    def replace_serving(self, pending: Iterable[ServingDemand]) -> None:
        """Replace all serving demand by replicas that have no node yet, where somebody else places replicas.

        Room is kept for them from one decision to the next; those that are placed are no part of the nodes' amounts any more.
        """
        for grant in self.grants.values():
            for node_id in grant.nodes:
                self.free.give(node_id, grant.demand.replica)
        self.grants = {demand.key: ServingGrant(demand) for demand in pending if demand.replicas > 0}

    @staticmethod
    def _note_surplus(grant: ServingGrant, now: float) -> None:
        if len(grant.nodes) <= grant.demand.replicas:
            grant.surplus_since_s = None
        elif grant.surplus_since_s is None:
            grant.surplus_since_s = now

    # Decisions

    def apply(self, decision: Decision, now: float) -> None:
        """Record a decision that is being carried out."""
        match decision:
            case Start(job_id=job_id, placement=placement):
                tenant = next(name for name, queue in self.queues.items() if job_id in queue)
                job = self.queues[tenant].remove(job_id, now)
                run = Run(job=job, placement=placement, started_s=now, changed_s=now, checkpoint_s=now)
                self._add_run(run, now)
            case Preempt(job_id=job_id) | Stop(job_id=job_id):
                self.runs[job_id] = replace(self.runs[job_id], shrinking_to=())
            case Shrink(job_id=job_id, placement=placement):
                self.runs[job_id] = replace(self.runs[job_id], shrinking_to=placement)
            case Grow(job_id=job_id, placement=placement):
                self._replace_placement(self.runs[job_id], placement, now)
            case StartReplicas(app=app, model=model, nodes=nodes):
                grant = self.grants[app, model]
                for node_id in nodes:
                    self.free.take(node_id, grant.demand.replica)
                grant.nodes.extend(nodes)
            case ReleaseReplicas(app=app, model=model, nodes=nodes):
                grant = self.grants[app, model]
                for node_id in nodes:
                    self.free.give(node_id, grant.demand.replica)
                    # The newest go first.
                    del grant.nodes[len(grant.nodes) - 1 - grant.nodes[::-1].index(node_id)]
                self._note_surplus(grant, now)
                if not grant.nodes and not grant.demand.replicas:
                    del self.grants[app, model]
            case Hold(job_id=job_id, band=int() as band):
                self.reserved = (job_id, band)

    def _add_run(self, run: Run, now: float) -> None:
        self.runs[run.job.id] = run
        if run.job.is_elastic:
            self.elastic.add(run.job.id)
        insort(self.ends, (run.ends_s(self.policy), run.job.id))
        self.free.take_all(run.placement, run.job.worker)
        self.accounts[run.job.tenant].add(run.job.needs(run.workers), now)

    def _replace_placement(self, run: Run, placement: Placement, now: float) -> None:
        changed = replace(run, placement=placement, changed_s=now, checkpoint_s=now, shrinking_to=None)
        self.runs[run.job.id] = changed
        self.free.give_all(run.placement, run.job.worker)
        self.free.take_all(placement, run.job.worker)
        self.accounts[run.job.tenant].add(run.job.needs(changed.workers) - run.job.needs(run.workers), now)
