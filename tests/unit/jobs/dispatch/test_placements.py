"""What nodes have for jobs beside other work, and where adopted runs are."""

from __future__ import annotations

from dataclasses import replace

from tandem.jobs.dispatch.decisions import NodeAmounts
from tandem.jobs.dispatch.placements import UNKNOWN, locate, nodes_for_jobs, used_pool
from tandem.jobs.scheduling import Job, Node, Resources, Run
from tandem.jobs.scheduling.pool import Pool
from tandem.jobs.scheduling.records import Placement

TOTAL = Resources(8.0, 4.0)


def node(name: str, used_gpus: float, is_placeable: bool = True) -> NodeAmounts:
    return NodeAmounts(id=name, total=TOTAL, free=TOTAL - Resources(used_gpus, used_gpus), is_placeable=is_placeable)


def run(placement: Placement) -> Run:
    job = Job(id="a", tenant="", worker=Resources(1.0, 1.0), worker_counts=(2,), submitted_s=0.0)
    return Run(job=job, placement=placement, started_s=0.0, changed_s=0.0, checkpoint_s=0.0)


def test_what_others_hold_is_what_is_used_less_the_scheduler_s_own_runs() -> None:
    nodes = [node("n1", 3.0), node("n2", 1.0), node("n3", 0.0, is_placeable=False)]
    assert nodes_for_jobs(nodes, [run((("n1", 2),))]) == [
        Node(id="n1", cpus=7.0, gpus=3.0),
        Node(id="n2", cpus=7.0, gpus=3.0),
    ]


def test_a_run_that_has_not_come_up_yet_lends_its_room_to_nobody() -> None:
    assert nodes_for_jobs([node("n1", 0.0)], [run((("n1", 2),))]) == [Node(id="n1", cpus=8.0, gpus=4.0)]


def test_a_run_that_has_not_come_up_yet_hides_no_replica() -> None:
    """Two replicas are up, and two workers that were counted on are not yet."""
    both = replace(node("n1", 2.0), serving=Resources(2.0, 2.0))
    assert nodes_for_jobs([both], [run((("n1", 2),))]) == [Node(id="n1", cpus=6.0, gpus=2.0)]
    # Once they are up, the same; what else runs there counts too.
    for used, free in ((4.0, 2.0), (5.0, 1.0)):
        up = replace(node("n1", used), serving=Resources(2.0, 2.0))
        assert nodes_for_jobs([up], [run((("n1", 2),))]) == [Node(id="n1", cpus=4.0 + free, gpus=free)]


def test_adopted_workers_are_where_something_runs_then_where_there_is_room() -> None:
    nodes = [node("n1", 0.0), node("n2", 2.0)]
    used, free = used_pool(nodes, []), Pool.of((each.id, each.free) for each in nodes)
    worker = Resources(1.0, 1.0)
    assert locate(worker, 3, used, free) == (("n1", 1), ("n2", 2))
    assert locate(worker, 6, used, free) == ((UNKNOWN, 1), ("n1", 3), ("n2", 2))
