"""Capacity of the cluster: written by the dispatcher that leads, read by any gateway without asking Ray."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from tandem.api import jobs as wire
from tandem.config import SchedulingConfig
from tandem.db.inserts import insert_into
from tandem.db.schema import CapacityRow
from tandem.errors import ClusterError
from tandem.jobs.dispatch.decisions import Capacity, NodeAmounts
from tandem.jobs.dispatch.requests import worker_of
from tandem.jobs.scheduling.from_config import tenants
from tandem.jobs.scheduling.records import Tenant
from tandem.jobs.scheduling.resources import Resources
from tandem.jobs.scheduling.shares import quota
from tandem.jobs.work.connection import WorkConnection
from tandem.jobs.work.leader import DISPATCHER, Term, check_term
from tandem.jobs.work.records import Job
from tandem.jobs.work.store import JobStore

RECORD_S = 10.0
"""Seconds between two records."""


class CapacityRecords(WorkConnection):
    """The newest record of a database."""

    def record(self, content: dict[str, Any], term: Term | None = None) -> None:
        """Replace the record by one of now; LeaseLostError unless the term, if one is given, is the newest."""
        with self._transaction() as (session, now):
            if term is not None:
                check_term(session, term)
            values = {"role": DISPATCHER, "at": now, "content": content}
            statement = insert_into(session, CapacityRow).values(**values)
            session.execute(statement.on_conflict_do_update(index_elements=["role"], set_=values))

    def read(self, tenant: str | None = None) -> wire.TandemCapacity:
        """The capacity with its age, and of the tenants `tenant` alone (None: those with shares or runs); ClusterError without
        a record.
        """
        with self._reading() as session:
            row, now = session.get(CapacityRow, DISPATCHER), self.clock.now(session.connection())
            if row is None:
                raise ClusterError(
                    "The cluster's capacity is not known: no app has dispatched jobs on this database yet."
                )
            content = {**row.content, "tenants": _shares(row.content, tenant)}
            age_s = max(0.0, (now - row.at).total_seconds())
            return wire.TandemCapacity.model_validate({**content, "at": row.at.timestamp(), "age_s": age_s})


class CapacityRecorder:
    """See `tandem.jobs.dispatch.chores.Chore`."""

    every_s = RECORD_S

    def __init__(
        self, capacity: Callable[[], Capacity], store: JobStore, records: CapacityRecords, config: SchedulingConfig
    ) -> None:
        self._capacity = capacity
        self._store = store
        self._records = records
        self._config = config

    def run(self, term: Term | None) -> bool:
        """Record what the cluster has now; False, as nothing is left."""
        content = content_of(self._capacity().nodes, self._store.active(), self._config)
        self._records.record(content, term)
        return False


def content_of(nodes: Iterable[NodeAmounts], jobs: Iterable[Job], config: SchedulingConfig) -> dict[str, Any]:
    """A record of these nodes and of the jobs that run. What is used, and not by jobs, is serving and other work."""
    pools: dict[str, list[NodeAmounts]] = defaultdict(list)
    for node in nodes:
        pools[node.node_type].append(node)
    types = [_pool(name, pool) for name, pool in sorted(pools.items())]
    held: dict[str, Resources] = defaultdict(Resources)
    for job in jobs:
        held[job.tenant] += worker_of(job) * (job.workers or job.resources.min_workers)
    used = _sum(each["used"] for each in types)
    training = _sum(map(_amounts, held.values())).least(used)
    sums = {name: _amounts(_sum(each[name] for each in types)) for name in ("total", "free", "cordoned")}
    known = {tenant.name: tenant for tenant in tenants(config)}
    return {
        **sums,
        "training": _amounts(training),
        "serving": _amounts(used - training),
        "node_types": types,
        "tenants": [_tenant(known.get(name, Tenant(name=name)), held[name]) for name in sorted({*known, *held})],
    }


def _pool(name: str, nodes: list[NodeAmounts]) -> dict[str, Any]:
    def amounts(of: Callable[[NodeAmounts], Resources]) -> dict[str, float]:
        return _amounts(sum((of(node) for node in nodes), Resources()))

    return {
        "node_type": name,
        "nodes": len(nodes),
        "total": amounts(lambda node: node.total),
        "used": amounts(lambda node: node.total - node.free),
        "free": amounts(lambda node: node.free if node.is_placeable else Resources()),
        "cordoned": amounts(lambda node: Resources() if node.is_placeable else node.free),
    }


def _tenant(tenant: Tenant, held: Resources) -> dict[str, Any]:
    limit = {"cpus": tenant.limit_cpus, "gpus": tenant.limit_gpus}
    own_quota = {"cpus": tenant.quota_cpus, "gpus": tenant.quota_gpus}
    return {
        "tenant": tenant.name,
        "weight": tenant.weight,
        "quota": own_quota,
        "limit": limit,
        "used": _amounts(held),
    }


def _shares(content: dict[str, Any], tenant: str | None) -> list[dict[str, Any]]:
    """The tenants of a record with their quotas, unset ones by weight, and dominant shares."""
    known = {each["tenant"]: each for each in content["tenants"]}
    if tenant is not None:
        known.setdefault(tenant, _tenant(Tenant(name=tenant), Resources()))
    total = Resources(**content["total"])
    total_weight = sum(each["weight"] for each in known.values())

    def with_share(each: dict[str, Any]) -> dict[str, Any]:
        own = Tenant(
            name=each["tenant"],
            weight=each["weight"],
            quota_cpus=each["quota"]["cpus"],
            quota_gpus=each["quota"]["gpus"],
        )
        share = Resources(**each["used"]).share_of(total)
        return {**each, "quota": _amounts(quota(own, total, total_weight)), "share": share}

    return [with_share(each) for name, each in known.items() if tenant in (None, name)]


def _sum(amounts: Iterable[dict[str, float]]) -> Resources:
    return sum((Resources(**each) for each in amounts), Resources())


def _amounts(resources: Resources) -> dict[str, float]:
    return {"cpus": max(0.0, resources.cpus), "gpus": max(0.0, resources.gpus)}
