"""Event-driven simulation of one scheduler on one trace, and its figures.

A run makes progress in proportion to its workers. One that is told to stop writes a checkpoint (`CHECKPOINT_COST_S`), during
which it makes none, and its next start takes `RESTART_S`; resizing costs the same. Replicas are ready when they are granted:
what is measured is the wait for resources.
"""

from __future__ import annotations

import heapq
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.scheduling.schedulers import Scheduler
from bench.scheduling.workload import CHECKPOINT_COST_S, HOUR_S, RESTART_S, SERVING_REPLICA, TraceJob, Workload
from tandem.jobs.scheduling import Grow, Preempt, ReleaseReplicas, ServingDemand, Shrink, Start, StartReplicas, Stop
from tandem.jobs.scheduling.records import Placement

TICK_S = 120.0
"""Time between two decisions without an event, for schedulers that have delays."""
SLOWDOWN_FLOOR_S = 600.0
"""Run time that shorter jobs count with: waiting a minute for a second is no slowdown of 60 (bounded slowdown)."""
CLASSES = (("1 GPU", 1), ("2 to 8 GPUs", 8), ("16 to 32 GPUs", 32), ("above 32 GPUs", 10**9))


@dataclass(slots=True)
class SimulatedRun:
    """Progress of one job."""

    trace: TraceJob
    left_s: float
    """Run time that is left with all workers."""
    workers: int = 0
    progress_from_s: float = 0.0
    """Time from which it makes progress with its present workers."""
    version: int = 0
    """Changes with each start and resize, so that earlier ends do not count."""
    first_start_s: float | None = None
    keep: int = 0
    """Workers after the resize that is under way."""

    def advance(self, now: float) -> None:
        speed = self.workers / self.trace.job.max_workers
        self.left_s -= max(0.0, now - self.progress_from_s) * speed
        self.progress_from_s = max(self.progress_from_s, now)

    def end_s(self) -> float:
        return self.progress_from_s + self.left_s * self.trace.job.max_workers / self.workers


@dataclass(slots=True)
class Totals:
    """Integrals over time, in GPU-seconds unless stated."""

    used: float = 0.0
    while_waiting: float = 0.0
    used_while_waiting: float = 0.0
    serving: float = 0.0
    held: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    entitled: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class Simulation:
    """One scheduler on one trace."""

    def __init__(
        self, workload: Workload, trace: Sequence[TraceJob], scheduler: Scheduler, *, ticks: bool,
        serving: Sequence[tuple[float, ServingDemand]] = (), gpus: int | None = None,
    ) -> None:  # fmt: skip
        self._scheduler = scheduler
        self._gpus = workload.gpus if gpus is None else gpus
        self._ticks = ticks
        self._runs = {each.job.id: SimulatedRun(each, each.run_s) for each in trace}
        self._events: list[tuple[float, int, str, Any]] = []
        self._count = 0
        self._last_submission_s = trace[-1].job.submitted_s
        self._waiting: dict[str, float] = dict.fromkeys((tenant.name for tenant in workload.tenant_list()), 0.0)
        """GPUs of waiting jobs by tenant."""
        self._held = dict(self._waiting)
        self._serving_gpus = 0.0
        self._missing: dict[tuple[str, str], list[float]] = defaultdict(list)
        """Times from which each missing replica has been needed."""
        self._granted: Counter[tuple[str, str]] = Counter()
        self._replica_waits_s: list[float] = []
        self._now = 0.0
        self._totals = Totals()
        self._decisions_s: list[float] = []
        self._tally: Counter[str] = Counter()
        self._lost_gpu_s = 0.0
        self._waits: dict[str, float] = {}
        self._slowdowns: dict[str, float] = {}
        for each in trace:
            self._schedule(each.job.submitted_s, "submit", each)
        for at_s, demand in serving:
            self._schedule(at_s, "serving", demand)

    def run(self) -> dict[str, Any]:
        """The figures, when all jobs have ended."""
        started = time.process_time()
        left, tick_at = len(self._runs), -1.0
        while self._events and left:
            now = self._events[0][0]
            self._integrate(now)
            while self._events and self._events[0][0] == now:
                _, _, kind, value = heapq.heappop(self._events)
                left -= self._handle(kind, value, now)
            before = time.perf_counter()
            decisions = self._scheduler.decide(now)
            self._decisions_s.append(time.perf_counter() - before)
            for decision in decisions:
                self._carry_out(decision, now)
            if self._ticks and tick_at <= now and (any(self._waiting.values()) or self._granted):
                tick_at = now + TICK_S
                self._schedule(tick_at, "tick", None)
        return self._figures(time.process_time() - started)

    def _schedule(self, at_s: float, kind: str, value: Any) -> None:
        self._count += 1
        heapq.heappush(self._events, (at_s, self._count, kind, value))

    # Events

    def _handle(self, kind: str, value: Any, now: float) -> int:
        """Handle an event; 1 if a job ended for good."""
        match kind:
            case "submit":
                self._scheduler.submit(value.job, now)
                self._waiting[value.job.tenant] += value.job.max_workers
            case "end":
                job_id, version = value
                run = self._runs[job_id]
                if run.version == version:
                    return self._end(run, now)
            case "stopped":
                return self._stopped(self._runs[value], now)
            case "timed out":
                self._tally["timed out"] += 1
                return self._end(self._runs[value], now)
            case "resized":
                job_id, version = value
                run = self._runs[job_id]
                if run.version == version:
                    self._scheduler.resized(job_id, now)
                    self._set_workers(run, run.keep, now, delay_s=RESTART_S)
            case "serving":
                self._set_demand(value, now)
        return 0

    def _end(self, run: SimulatedRun, now: float) -> int:
        self._scheduler.finished(run.trace.job.id, now)
        self._held[run.trace.job.tenant] -= run.workers
        return self._count_ended(run, now)

    def _count_ended(self, run: SimulatedRun, now: float) -> int:
        job = run.trace.job
        run.version += 1
        run.left_s, run.workers = 0.0, 0
        assert run.first_start_s is not None
        self._waits[job.id] = run.first_start_s - job.submitted_s
        base_s = max(SLOWDOWN_FLOOR_S, run.trace.run_s)
        self._slowdowns[job.id] = max(1.0, (now - job.submitted_s) / base_s)
        return 1

    def _stopped(self, run: SimulatedRun, now: float) -> int:
        job = run.trace.job
        self._held[job.tenant] -= run.workers
        if not self._scheduler.preempted(job.id, now):
            self._tally["timed out"] += 1
            return self._count_ended(run, now)
        self._waiting[job.tenant] += job.max_workers
        run.version += 1
        run.workers = 0
        return 0

    def _set_demand(self, demand: ServingDemand, now: float) -> None:
        missing = self._missing[demand.key]
        wanted = demand.replicas - self._granted[demand.key]
        # The latest needs are the first to go away.
        del missing[max(0, wanted) :]
        missing += [now] * max(0, wanted - len(missing))
        self._scheduler.set_serving(demand, now)

    # Decisions

    def _carry_out(self, decision: Any, now: float) -> None:
        match decision:
            case Start():
                self._start(self._runs[decision.job_id], decision.placement, now)
            case Grow():
                self._tally["resizes"] += 1
                self._pay(self._runs[decision.job_id])
                run = self._runs[decision.job_id]
                self._set_workers(run, _count(decision.placement), now, delay_s=CHECKPOINT_COST_S + RESTART_S)
            case Shrink():
                run = self._runs[decision.job_id]
                self._tally["resizes"] += 1
                self._pay(run)
                run.advance(now)
                run.keep, run.version = _count(decision.placement), run.version + 1
                run.progress_from_s = now + CHECKPOINT_COST_S
                self._schedule(now + CHECKPOINT_COST_S, "resized", (decision.job_id, run.version))
            case Preempt() | Stop():
                run = self._runs[decision.job_id]
                run.advance(now)
                run.version += 1
                if isinstance(decision, Preempt):
                    self._tally["preemptions"] += 1
                    self._pay(run)
                kind = "stopped" if isinstance(decision, Preempt) else "timed out"
                self._schedule(now + CHECKPOINT_COST_S, kind, decision.job_id)
            case StartReplicas(app=app, model=model, nodes=nodes):
                self._granted[app, model] += len(nodes)
                self._serving_gpus += len(nodes) * SERVING_REPLICA.gpus
                missing = self._missing[app, model]
                self._replica_waits_s += [now - since_s for since_s in missing[: len(nodes)]]
                del missing[: len(nodes)]
            case ReleaseReplicas(app=app, model=model, nodes=nodes):
                self._granted[app, model] -= len(nodes)
                self._serving_gpus -= len(nodes) * SERVING_REPLICA.gpus

    def _start(self, run: SimulatedRun, placement: Placement, now: float) -> None:
        job = run.trace.job
        self._waiting[job.tenant] -= job.max_workers
        restarted = run.first_start_s is not None
        if run.first_start_s is None:
            run.first_start_s = now
        run.progress_from_s = now
        self._set_workers(run, _count(placement), now, delay_s=RESTART_S if restarted else 0.0)

    def _set_workers(self, run: SimulatedRun, workers: int, now: float, *, delay_s: float) -> None:
        run.advance(now)
        self._held[run.trace.job.tenant] += workers - run.workers
        run.workers = workers
        run.progress_from_s = now + delay_s
        run.version += 1
        self._schedule(run.end_s(), "end", (run.trace.job.id, run.version))

    def _pay(self, run: SimulatedRun) -> None:
        self._lost_gpu_s += run.workers * (CHECKPOINT_COST_S + RESTART_S)

    # Figures

    def _integrate(self, now: float) -> None:
        """Add the time since the last event, while jobs are being submitted: afterwards the cluster runs empty."""
        passed_s = min(now, self._last_submission_s) - self._now
        self._now = now
        if passed_s <= 0:
            return
        totals, used = self._totals, sum(self._held.values())
        totals.used += used * passed_s
        totals.serving += self._serving_gpus * passed_s
        if not any(waiting > 0 for waiting in self._waiting.values()):
            return
        available = self._gpus - self._serving_gpus
        totals.while_waiting += available * passed_s
        totals.used_while_waiting += used * passed_s
        demands = {tenant: self._held[tenant] + waiting for tenant, waiting in self._waiting.items()}
        for tenant, entitled in max_min_shares(demands, available).items():
            totals.entitled[tenant] += entitled * passed_s
            totals.held[tenant] += min(entitled, self._held[tenant]) * passed_s

    def _figures(self, seconds: float) -> dict[str, Any]:
        totals = self._totals
        waits = list(self._waits.values())
        served = [totals.held[tenant] / entitled for tenant, entitled in totals.entitled.items() if entitled > 0]
        classes = {}
        lowest = 0
        for name, highest in CLASSES:
            those = [job_id for job_id in self._waits if lowest < self._runs[job_id].trace.job.max_workers <= highest]
            lowest = highest
            classes[name] = {
                "jobs": len(those),
                "mean_wait_h": _mean([self._waits[job_id] for job_id in those]) / HOUR_S,
                "p95_wait_h": quantile([self._waits[job_id] for job_id in those], 0.95) / HOUR_S,
            }
        span_s = self._last_submission_s
        return {
            "jobs": len(waits),
            "utilisation": totals.used_while_waiting / totals.while_waiting if totals.while_waiting else 1.0,
            "waiting_share": totals.while_waiting / (self._gpus * span_s),
            "mean_wait_h": _mean(waits) / HOUR_S,
            "median_wait_h": quantile(waits, 0.5) / HOUR_S,
            "p95_wait_h": quantile(waits, 0.95) / HOUR_S,
            "max_wait_h": max(waits) / HOUR_S,
            "mean_slowdown": _mean(list(self._slowdowns.values())),
            "p95_slowdown": quantile(list(self._slowdowns.values()), 0.95),
            "jain": jain(served),
            "classes": classes,
            "preemptions": self._tally["preemptions"],
            "timed_out": self._tally["timed out"],
            "resizes": self._tally["resizes"],
            "lost_gpu_h": self._lost_gpu_s / HOUR_S,
            "training_gpu_h": totals.used / HOUR_S,
            "serving_gpu_h": totals.serving / HOUR_S,
            "replica_wait_s": {
                "count": len(self._replica_waits_s),
                "p50": quantile(self._replica_waits_s, 0.5),
                "p95": quantile(self._replica_waits_s, 0.95),
                "max": max(self._replica_waits_s, default=0.0),
            },
            "decisions": len(self._decisions_s),
            "decision_ms": {
                "p50": 1e3 * quantile(self._decisions_s, 0.5),
                "p99": 1e3 * quantile(self._decisions_s, 0.99),
            },
            "seconds": seconds,
        }  # fmt: skip


def max_min_shares(demands: dict[str, float], capacity: float) -> dict[str, float]:
    """Max-min fair shares of equally weighted tenants: nobody gets more than it asks for, and what is left is shared."""
    shares, left = {}, capacity
    for place, (tenant, demand) in enumerate(sorted(demands.items(), key=lambda item: item[1])):
        shares[tenant] = min(demand, left / (len(demands) - place))
        left -= shares[tenant]
    return shares


def jain(values: Sequence[float]) -> float:
    """Jain's fairness index: 1 if all are equal, 1/n if one has all."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values are."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def _count(placement: Placement) -> int:
    return sum(workers for _, workers in placement)
