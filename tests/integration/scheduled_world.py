"""A dispatcher with the scheduler, a real store, and a simulated cluster: nodes, replicas of Serve, and attempts in memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from tandem.config import SchedulingConfig, TenantShareConfig, from_dict
from tandem.jobs.dispatch.decisions import Capacity, NodeAmounts
from tandem.jobs.dispatch.dispatcher import Dispatcher
from tandem.jobs.dispatch.history import read_history
from tandem.jobs.dispatch.scheduler import Scheduler
from tandem.jobs.runners.memory import MemoryRunner
from tandem.jobs.scheduling import ClusterState, Resources, ServingDemand
from tandem.jobs.work import records
from tandem.jobs.work.clock import ManualClock
from tandem.jobs.work.records import Job, JobSubmission
from tandem.jobs.work.states import JobKind, State
from tandem.jobs.work.store import JobStore

GPU = Resources(1.0, 1.0)


def submission(name: str, gpus: int = 1, **more: Any) -> JobSubmission:
    """A job of so many workers of a GPU each; `fewest`: with which it goes on, `scheduling`: in its spec."""
    fewest, asked = more.pop("fewest", gpus), more.pop("scheduling", None)
    resources = records.Resources(gpus_per_worker=1.0, min_workers=fewest, max_workers=gpus)
    values: dict[str, Any] = {"kind": JobKind.TRAIN, "runner": "memory", "resources": resources} | more
    return JobSubmission(name=name, id=name, spec={} if asked is None else {"scheduling": asked}, **values)


@dataclass
class World:
    """Runs and replicas take GPUs of the nodes in the order in which they come."""

    store: JobStore
    clock: ManualClock
    nodes: dict[str, Resources] = field(default_factory=lambda: {"n1": Resources(8.0, 4.0)})
    cordoned: set[str] = field(default_factory=set)
    config: SchedulingConfig = field(default_factory=lambda: from_dict(SchedulingConfig, {"min_run_s": 60}))
    wanted_replicas: int = 0
    replica: Resources = GPU

    def __post_init__(self) -> None:
        self.runner = MemoryRunner()
        self.places: dict[str, list[str]] = {}
        """Nodes of the workers of each attempt, and of the replica `replica-N`."""
        self.restart()

    @property
    def state(self) -> ClusterState:
        return self.scheduler.state

    def restart(self) -> None:
        """Replace the dispatcher, which dies without a word."""
        self.scheduler = Scheduler(self.config, functools.partial(read_history, self.store))
        self.dispatcher = Dispatcher(self.store, {"memory": self.runner}, self.capacity, decide=self.scheduler)
        self.clock.advance(31.0)  # the lead of the one before runs out

    def close(self) -> None:
        self.dispatcher.close()

    def free(self, node: str) -> Resources:
        """What nothing runs on; the amounts of what runs are those of its worker."""
        free = self.nodes[node]
        for name, places in self.places.items():
            free = free - self._unit(name) * places.count(node)
        return free

    def _unit(self, name: str) -> Resources:
        if name.startswith("replica-"):
            return self.replica
        need = self.runner.jobs[name].resources
        return Resources(need.cpus_per_worker, need.gpus_per_worker)

    def settle(self) -> None:
        """Let Ray place what fits, replicas first, and free what has ended."""
        running = self.runner.running
        replicas = [f"replica-{number}" for number in range(self.wanted_replicas)]
        self.places = {name: places for name, places in self.places.items() if name in running or name in replicas}
        for name in (*replicas, *running):
            missing = 1 if name in replicas else (running[name].workers or 1)
            places = self.places.setdefault(name, [])
            for node in sorted(self.nodes):
                while len(places) < missing and self._unit(name).fits_in(self.free(node)):
                    places.append(node)

    @property
    def pending_replicas(self) -> int:
        return self.wanted_replicas - sum(bool(self.places.get(f"replica-{n}")) for n in range(self.wanted_replicas))

    def capacity(self) -> Capacity:
        self.settle()
        nodes = tuple(
            NodeAmounts(id=node, total=total, free=self.free(node), is_placeable=node not in self.cordoned)
            for node, total in self.nodes.items()
        )
        pending = ServingDemand(
            app="app", model="m", replicas=self.pending_replicas, replica=self.replica, priority=100
        )
        return Capacity(cpus=0.0, nodes=nodes, pending_replicas=(pending,))

    def rounds(self, count: int = 1, *, seconds: float = 1.0) -> None:
        """Rounds in which whatever is told to leave does so at once."""
        for _ in range(count):
            self.runner.leave()
            self.clock.advance(seconds)
            assert self.dispatcher.round()

    def job(self, job_id: str) -> Job:
        return self.store.get(job_id)

    def workers(self, job_id: str) -> int | None:
        """Number of workers with which a job runs; None: it does not run."""
        job = self.job(job_id)
        return job.workers if job.state is State.RUNNING else None


def with_tenants(shares: dict[str, dict[str, Any]], **more: Any) -> SchedulingConfig:
    tenants = {name: from_dict(TenantShareConfig, values) for name, values in shares.items()}
    return SchedulingConfig(tenants=tenants, min_run_s=60.0, **more)
