"""Resources for serving: replicas come before training, take what is free, and have lower training work give way."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.jobs.scheduling.decisions import Decision, ReleaseReplicas, StartReplicas
from tandem.jobs.scheduling.pool import Pool
from tandem.jobs.scheduling.records import Placement, Run, ServingDemand, ServingGrant
from tandem.jobs.scheduling.state import ClusterState
from tandem.jobs.scheduling.victims import Victim, candidates, choose


@dataclass(slots=True)
class ServingPlan:
    """Decisions for serving, and the runs that give way."""

    decisions: list[Decision] = field(default_factory=list)
    giving_way: dict[str, Placement] = field(default_factory=dict)
    """Placement that each run keeps which is told to stop or shrink."""


def plan_serving(state: ClusterState, free: Pool, now: float) -> ServingPlan:
    """Decide for all models, the highest priority first. Takes from `free` what replicas get now, or when runs have given way;
    amounts may become negative there, so that nothing else starts in the room that replicas wait for.
    """
    plan = ServingPlan()
    if not state.grants:
        return plan
    released = free.copy()
    for run in state.runs.values():
        if run.shrinking_to is not None:
            released.give_all(run.placement, run.job.worker)
            released.take_all(run.shrinking_to, run.job.worker)
    for grant in sorted(state.grants.values(), key=lambda each: (-each.demand.priority, each.demand.key)):
        demand = grant.demand
        surplus = _unneeded(grant, state.policy.give_back_s, now)
        if surplus:
            plan.decisions.append(ReleaseReplicas(app=demand.app, model=demand.model, nodes=surplus))
        missing = demand.replicas - len(grant.nodes)
        if missing > 0:
            _add_replicas(state, demand, missing, free, released, plan, now)
    return plan


def _unneeded(grant: ServingGrant, give_back_s: float, now: float) -> tuple[str, ...]:
    surplus = len(grant.nodes) - grant.demand.replicas
    if surplus <= 0 or grant.surplus_since_s is None or now - grant.surplus_since_s < give_back_s:
        return ()
    return tuple(grant.nodes[-surplus:])


def _add_replicas(
    state: ClusterState, demand: ServingDemand, missing: int, free: Pool, released: Pool, plan: ServingPlan, now: float
) -> None:
    started = _claim(demand, missing, free, free, released)
    if started:
        plan.decisions.append(StartReplicas(app=demand.app, model=demand.model, nodes=tuple(started)))
    missing -= len(started)
    missing -= len(_claim(demand, missing, released, free, released))
    if not missing:
        return
    victims = _give_way(state, demand, missing, released, plan, now)
    noun = "replica" if missing == 1 else "replicas"
    for victim in victims:
        plan.giving_way[victim.run.job.id] = victim.keep
        plan.decisions.append(victim.decision(f"{demand.model} of {demand.app} needs {missing} more {noun}"))
        released.give_all(victim.freed, victim.run.job.worker)
    _claim(demand, missing, released, free, released)


def _claim(demand: ServingDemand, replicas: int, source: Pool, free: Pool, released: Pool) -> list[str]:
    """Nodes for up to `replicas` replicas that fit into `source`; taken from both pools."""
    nodes: list[str] = []
    while len(nodes) < replicas and (placed := source.pack(demand.replica, 1)):
        (node_id,) = placed
        free.take(node_id, demand.replica)
        released.take(node_id, demand.replica)
        nodes.append(node_id)
    return nodes


def _give_way(
    state: ClusterState, demand: ServingDemand, missing: int, released: Pool, plan: ServingPlan, now: float
) -> list[Victim]:
    """The cheapest runs that make room for as many of the missing replicas as possible."""

    def is_lower(run: Run) -> bool:
        return run.job.priority < demand.priority and run.job.id not in plan.giving_way

    cheapest_first = candidates(state, now, is_lower, is_lower)
    for replicas in range(missing, 0, -1):
        victims = choose(released, demand.replica, replicas, cheapest_first)
        if victims:
            return victims
    return []
