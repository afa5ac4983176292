"""Properties of the scheduler under any sequence of events, from a driver that carries out every decision."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import given, settings

from tandem.jobs.scheduling import (
    ClusterState,
    Decision,
    Grow,
    Hold,
    Job,
    Node,
    Policy,
    Preempt,
    ReleaseReplicas,
    Resources,
    Run,
    ServingDemand,
    Shrink,
    Start,
    Stop,
    Tenant,
    decide,
)
from tandem.jobs.scheduling.resources import TOLERANCE

TENANTS = (Tenant(name="a", weight=2.0), Tenant(name="b", limit_gpus=6), Tenant(name="c", quota_gpus=4))
NODES = tuple(Node(id=f"n{number}", cpus=8, gpus=gpus) for number, gpus in enumerate((8, 8, 4, 0)))
POLICY = Policy(
    min_run_s=20.0, preempt_after_s=10.0, give_back_s=30.0, drain_s=10.0, starvation_s=2000.0, aging_s=500.0
)
STEP_S = 10.0


@st.composite
def jobs(draw: st.DrawFn, number: int) -> Job:
    """A job that some state of the cluster holds, or none does."""
    per_node = draw(st.sampled_from((1, 1, 2)))
    counts = draw(st.sets(st.sampled_from((1, 2, 3, 4, 6, 12)), min_size=1, max_size=3))
    return Job(
        id=f"job-{number:02}",
        tenant=draw(st.sampled_from(("a", "b", "c", "unknown"))),
        worker=draw(st.sampled_from((Resources(1, 1), Resources(0.5, 0.5), Resources(1, 0), Resources(2, 1)))),
        worker_counts=tuple(sorted(count * per_node for count in counts)),
        workers_per_node=per_node,
        priority=draw(st.integers(-1, 2)),
        submitted_s=0.0,
        time_limit_s=draw(st.sampled_from((30.0, 60.0, 200.0, 1000.0))),
        preemptible=draw(st.booleans()),
        checkpoint_cost_s=draw(st.sampled_from((None, 10.0))),
    )


@st.composite
def scenarios(draw: st.DrawFn) -> list[tuple[float, Job | ServingDemand, float]]:
    """Events: time, a job or a serving demand, and the share of its time limit that the job runs."""
    events = []
    for number in range(draw(st.integers(1, 14))):
        at_s = STEP_S * draw(st.integers(0, 30))
        share = draw(st.sampled_from((0.3, 1.0, 2.0)))
        events.append((at_s, draw(jobs(number)), share))
    for _ in range(draw(st.integers(0, 4))):
        at_s, replicas = STEP_S * draw(st.integers(0, 40)), draw(st.integers(0, 4))
        need = ServingDemand(app="app", model="m", replicas=replicas, replica=Resources(1, 2), priority=1)
        events.append((at_s, need, 0.0))
    return sorted(events, key=lambda event: event[0])


@dataclass
class Driver:
    """Carries out decisions: a run that is told to stop or shrink has done so one step later."""

    state: ClusterState = field(default_factory=lambda: ClusterState(POLICY, TENANTS, NODES))
    leaving: dict[str, Decision] = field(default_factory=dict)
    work_s: dict[str, float] = field(default_factory=dict)
    """Run time that each job needs, in all."""

    def report(self, now: float) -> None:
        for job_id, decision in list(self.leaving.items()):
            del self.leaving[job_id]
            if job_id not in self.state.runs:
                continue
            match decision:
                case Preempt():
                    self.state.preempted(job_id, now)
                case Shrink():
                    self.state.resized(job_id, now)
                case Stop():
                    self.state.finished(job_id, now)
        for run in list(self.state.runs.values()):
            if now - run.started_s + run.job.ran_s >= self.work_s[run.job.id]:
                self.state.finished(run.job.id, now)

    def step(self, now: float) -> list[Decision]:
        decisions = decide(self.state, now)
        assert decide(self.state, now) == decisions
        for decision in decisions:
            self.check(decision, now)
            self.state.apply(decision, now)
            if isinstance(decision, Preempt | Shrink | Stop):
                self.leaving[decision.job_id] = decision
        # The reserved nodes are chosen anew each time, so that one more job may fit beside them; nothing else changes.
        if not any(isinstance(each, ReleaseReplicas) for each in decisions):
            again = [each for each in decide(self.state, now) if not isinstance(each, Hold)]
            assert all(isinstance(each, Start) and each.reason.startswith("fits beside job") for each in again)
        self.check_capacity()
        return decisions

    def check(self, decision: Decision, now: float) -> None:
        state = self.state
        match decision:
            case Start(job_id=job_id, placement=placement):
                job = next(queue[job_id] for queue in state.queues.values() if job_id in queue)
                check_gang(job, sum(workers for _, workers in placement), placement)
            case Grow(job_id=job_id, placement=placement):
                run = state.runs[job_id]
                check_gang(run.job, sum(workers for _, workers in placement), placement)
                assert sum(workers for _, workers in placement) > run.workers
            case Shrink(job_id=job_id, placement=placement):
                run = state.runs[job_id]
                check_gang(run.job, sum(workers for _, workers in placement), placement)
                before = dict(run.placement)
                assert all(workers <= before[node] for node, workers in placement)
                assert now - run.changed_s >= POLICY.min_run_s
            case Preempt(job_id=job_id):
                run = state.runs[job_id]
                assert run.job.preemptible
                assert now - run.changed_s >= POLICY.min_run_s
                assert run.job.preemptions < POLICY.max_preemptions
            case Stop(job_id=job_id):
                run = state.runs[job_id]
                assert now - run.started_s + run.job.ran_s >= (run.job.time_limit_s or 0.0)

    def check_capacity(self) -> None:
        used = {node.id: Resources() for node in NODES}
        for run in self.state.runs.values():
            for node, workers in run.placement:
                used[node] = used[node] + run.job.worker * workers
        for grant in self.state.grants.values():
            for node in grant.nodes:
                used[node] = used[node] + grant.demand.replica
        for node in NODES:
            assert used[node.id].fits_in(Resources(node.cpus, node.gpus))
            free = self.state.free.free(node.id)
            assert abs(free.gpus + used[node.id].gpus - node.gpus) < TOLERANCE
        for account in self.state.accounts.values():
            held = sum((run.job.needs(run.workers).gpus for run in runs_of(self.state, account.tenant.name)), 0.0)
            assert abs(account.held.gpus - held) < TOLERANCE
            assert account.held.fits_in(account.tenant.limit)


def runs_of(state: ClusterState, tenant: str) -> list[Run]:
    return [run for run in state.runs.values() if run.job.tenant == tenant]


def check_gang(job: Job, workers: int, placement: tuple[tuple[str, int], ...]) -> None:
    assert workers in job.worker_counts
    assert all(count > 0 and count % job.workers_per_node == 0 for _, count in placement)


@settings(max_examples=40)
@given(scenarios())
def test_capacity_limits_gangs_and_protections_hold_and_a_decision_is_repeatable(events) -> None:
    driver = Driver()
    for number in range(120):
        now = number * STEP_S
        driver.report(now)
        for at_s, what, share in [event for event in events if event[0] == now]:
            if isinstance(what, ServingDemand):
                driver.state.set_serving(what, now)
            else:
                submitted = Job(**{name: getattr(what, name) for name in what.__slots__} | {"submitted_s": at_s})
                assert submitted.time_limit_s is not None
                driver.work_s[submitted.id] = share * submitted.time_limit_s
                driver.state.submit(submitted, now)
        driver.step(now)


@settings(max_examples=40)
@given(st.data())
def test_a_job_starts_no_later_than_was_said_at_first(data: st.DataObject) -> None:
    """Without preemption and with all jobs known, the first that waits starts by the time of its first reservation."""
    driver = Driver(ClusterState(POLICY, [Tenant(name="a")], NODES))
    for number in range(data.draw(st.integers(2, 14))):
        drawn = data.draw(jobs(number))
        changes = {"tenant": "a", "priority": 0, "preemptible": False, "submitted_s": float(number)}
        each = Job(**{name: getattr(drawn, name) for name in drawn.__slots__} | changes)
        assert each.time_limit_s is not None
        driver.work_s[each.id] = data.draw(st.sampled_from((0.3, 1.0))) * each.time_limit_s
        driver.state.submit(each, 0.0)
    promised: dict[str, float] = {}
    for number in range(300):
        now = number * STEP_S
        driver.report(now)
        for decision in driver.step(now):
            match decision:
                case Hold(job_id=job_id, expected_s=float() as expected_s):
                    promised.setdefault(job_id, expected_s)
                    assert expected_s <= promised[job_id] + TOLERANCE
                case Start(job_id=job_id) if job_id in promised:
                    # The driver reports ends at full steps.
                    assert now <= promised[job_id] + STEP_S


@settings(max_examples=10)
@given(scenarios())
def test_every_job_that_can_start_does_in_the_end(events) -> None:
    driver = Driver()
    started: set[str] = set()
    for _, what, share in events:
        if isinstance(what, Job):
            assert what.time_limit_s is not None
            driver.work_s[what.id] = share * what.time_limit_s
            driver.state.submit(what, 0.0)
    # A stream of small jobs of a higher priority that never ends must not hold the others up for good.
    for number in range(1500):
        now = number * STEP_S
        driver.report(now)
        if number % 2 == 0 and number < 600:
            filler = Job(
                id=f"filler-{number:04}", tenant="c", worker=Resources(1, 1), worker_counts=(2,), priority=2,
                submitted_s=now, time_limit_s=100.0,
            )  # fmt: skip
            driver.work_s[filler.id] = 100.0
            driver.state.submit(filler, now)
        started |= {decision.job_id for decision in driver.step(now) if isinstance(decision, Start)}
        if started >= {what.id for _, what, _ in events if isinstance(what, Job) and can_start(driver.state, what)}:
            return
    raise AssertionError(f"never started: {set(driver.work_s) - started}")


def can_start(state: ClusterState, job: Job) -> bool:
    """Whether an empty cluster holds the job, and its tenant's limit allows it."""
    limit = state.accounts[job.tenant].tenant.limit
    return state.capacity.slots(job.unit) * job.workers_per_node >= job.min_workers and job.needs().fits_in(limit)
