"""The dispatcher records what the cluster has; gateways read it with its age, and each tenant's quota and share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tandem.config import SchedulingConfig
from tandem.config.load import from_dict
from tandem.errors import ClusterError
from tandem.jobs.dispatch.decisions import Capacity, NodeAmounts
from tandem.jobs.dispatch.dispatcher import Dispatcher
from tandem.jobs.runners.memory import MemoryRunner
from tandem.jobs.scheduling import Resources
from tandem.jobs.tracking.capacity import CapacityRecorder, CapacityRecords
from tandem.jobs.work.clock import ManualClock
from tandem.jobs.work.records import JobSubmission
from tandem.jobs.work.records import Resources as JobResources
from tandem.jobs.work.states import JobKind
from tandem.jobs.work.store import JobStore

CONFIG = from_dict(SchedulingConfig, {"tenants": {"lab": {"weight": 3.0, "limit": {"gpus": 4}}}})
NODES = (
    NodeAmounts(id="a", total=Resources(16, 8), free=Resources(6, 2), node_type="gpu"),
    NodeAmounts(id="b", total=Resources(16, 8), free=Resources(16, 8), node_type="gpu", is_placeable=False),
    NodeAmounts(id="c", total=Resources(8, 0), free=Resources(7, 0)),
)


@pytest.fixture
def records(url: str, clock: ManualClock) -> Iterator[CapacityRecords]:
    with CapacityRecords(url, clock=clock) as opened:
        yield opened


def submit(store: JobStore, tenant: str, workers: int) -> str:
    need = JobResources(cpus_per_worker=1, gpus_per_worker=1, min_workers=workers, max_workers=workers)
    spec = JobSubmission(
        kind=JobKind.TRAIN, name=f"of-{tenant}", spec={}, tenant=tenant, resources=need, runner="memory"
    )
    return store.submit(spec).job.id


def test_what_is_used_is_told_by_serving_and_jobs_with_the_shares_of_tenants(
    store: JobStore, records: CapacityRecords, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CapacityRecorder, "every_s", 0.0)
    for tenant, workers in (("lab", 3), ("shop", 1)):
        submit(store, tenant, workers)
    found = Capacity(cpus=40, gpus=16, nodes=NODES)
    recorder = CapacityRecorder(lambda: found, store, records, CONFIG)
    dispatcher = Dispatcher(store, {"memory": MemoryRunner()}, lambda: found, chores=[recorder])
    for _ in range(3):
        dispatcher.round()
    clock.advance(7.0)
    now = records.read()
    assert now.age_s == 7.0 and (now.total.cpus, now.total.gpus) == (40, 16)
    # 11 CPUs and 6 GPUs are used, 4 of each by jobs; the node b gets no new work.
    assert (now.training.cpus, now.training.gpus) == (4, 4) and (now.serving.cpus, now.serving.gpus) == (7, 2)
    assert (now.free.cpus, now.free.gpus) == (13, 2) and (now.cordoned.cpus, now.cordoned.gpus) == (16, 8)
    assert [(each.node_type, each.nodes, each.total.gpus, each.free.gpus) for each in now.node_types] == [
        ("", 1, 0, 0), ("gpu", 2, 16, 2),
    ]  # fmt: skip
    lab, shop = now.tenants
    assert (lab.tenant, lab.quota.gpus, lab.limit.gpus, lab.used.gpus, lab.share) == ("lab", 12, 4, 3, 3 / 16)
    assert (shop.tenant, shop.quota.gpus, shop.limit.gpus, shop.used.gpus) == ("shop", 4, None, 1)
    (new,) = records.read("new").tenants
    assert (new.tenant, new.quota.gpus, new.used.gpus, new.share) == ("new", 16 / 5, 0, 0)
    dispatcher.close()


def test_a_process_that_does_not_lead_records_nothing(store: JobStore, records: CapacityRecords) -> None:
    def dispatcher(cpus: float) -> Dispatcher:
        node = NodeAmounts(id="a", total=Resources(cpus, 0), free=Resources(cpus, 0))
        found = Capacity(cpus=cpus, nodes=(node,))
        recorder = CapacityRecorder(lambda: found, store, records, CONFIG)
        return Dispatcher(store, {}, lambda: found, chores=[recorder])

    with pytest.raises(ClusterError, match="not known"):
        records.read()
    leader, other = dispatcher(1), dispatcher(2)
    leader.round()
    other.round()
    assert records.read().total.cpus == 1
    leader.resign()
    other.round()
    assert records.read().total.cpus == 2
    for each in (leader, other):
        each.close()
