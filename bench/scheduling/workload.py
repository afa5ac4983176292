"""The jobs and the serving demand of bench/scheduling/scheduler_sim.py, drawn from published distributions.

Published:

- Workers of a job, one GPU each: Venus, a cluster of 1,022 GPUs in SenseTime's Helios traces (Hu et al., SC 2021): the fractions
  of jobs at each number of GPUs in Figure "job_cdf_gpunum" of the authors' artifact. Their mean, 6.7 GPUs, is that of the
  artifact's helios_cluster_summary.csv. Jobs above 64 GPUs have 128 here.
- Run times: lognormal. The mean at each number of GPUs is what that figure's fractions of GPU time make of Venus's 125,303 jobs
  with 13,041 s on average. `SIGMA` is that of the 83,154 run times of Microsoft's Philly cluster (Jeon et al., ATC 2019) that
  Alibaba's clusterdata has as philly_runtime.csv: median 1,186 s, 95th percentile 49,948 s. With it the median here is near
  Philly's.
- Jobs that fail (15.5 %) or are cancelled (22.1 %): helios_cluster_summary.csv. They end at a random part of their time.
- Time of day: Venus has fewest submissions at 6 h and most at 16 h (Figure "cluster_diurnal"). The ratio, 3, is an assumption.
- Interruptions by hardware: 419 in 54 days on 16,384 GPUs (the Llama 3 report, 2024), each repeating the work since the last
  checkpoint.

Assumed: run times end at 7 days; jobs are submitted in groups (sweeps), 3 on average; time limits are the planned run time
times 1.2 to 4, rounded up to one of `LIMITS_S`; tenants submit by Zipf's law and have equal weights; 10 % of jobs have a high
and 20 % a low priority; a checkpoint takes 30 s and is written every 30 minutes; a start after a stop takes 60 s; with
`elastic`, that share of the jobs with 4 workers or more also runs with half or a quarter of them, at a speed in proportion.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from tandem.jobs.scheduling import Job, Node, Resources, ServingDemand, Tenant

DAY_S, HOUR_S = 86400.0, 3600.0
GPUS_PER_NODE, CPUS_PER_NODE = 8, 96
WORKER = Resources(8, 1)
SIGMA = 2.2
MAX_RUN_S = 7 * DAY_S
SIZES = {
    # GPUs: (share of jobs, mean run time in seconds)
    1: (0.518, 8_750),
    2: (0.056, 29_900),
    4: (0.074, 16_000),
    8: (0.252, 14_400),
    16: (0.042, 23_800),
    24: (0.009, 8_700),
    32: (0.027, 26_500),
    48: (0.0055, 17_200),
    64: (0.0023, 19_400),
    128: (0.0134, 5_400),
}
FAILED, CANCELLED = 0.155, 0.221
GROUP_MEAN = 3
PEAK_HOUR, PEAK_TO_TROUGH = 16.0, 3.0
GPU_S_BETWEEN_INTERRUPTIONS = 16_384 * 54 * DAY_S / 419
CHECKPOINT_EVERY_S, CHECKPOINT_COST_S, RESTART_S = 1800.0, 30.0, 60.0
LIMITS_S = tuple(hours * HOUR_S for hours in (0.5, 1, 2, 4, 8, 12, 24, 48, 96, 168, 336, 672))
HIGH, NORMAL, LOW = 1, 0, -1
SERVING_REPLICA = Resources(32, 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceJob:
    """A job, and the time that it takes with all of its workers."""

    job: Job
    run_s: float


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Parameters of a trace."""

    jobs: int = 10_000
    gpus: int = 1_000
    load: float = 0.95
    """GPU-time that the jobs need, as a share of what the cluster has while they are submitted."""
    tenants: int = 8
    elastic: float = 0.0
    seed: int = 0

    def nodes(self) -> list[Node]:
        """The cluster."""
        count = self.gpus // GPUS_PER_NODE
        return [Node(id=f"node-{number:04}", cpus=CPUS_PER_NODE, gpus=GPUS_PER_NODE) for number in range(count)]

    def tenant_list(self) -> list[Tenant]:
        """The tenants, with equal weights."""
        return [Tenant(name=f"tenant-{number}") for number in range(self.tenants)]

    def trace(self) -> list[TraceJob]:
        """The jobs in the order of submission."""
        dice = random.Random(self.seed)
        drawn = [self._draw(number, dice) for number in range(self.jobs)]
        total_gpu_s = sum(each.run_s * each.job.max_workers for each in drawn)
        span_s = total_gpu_s / (self.gpus * self.load)
        times = _submissions(self.jobs, span_s, dice)
        ordered: list[TraceJob] = []
        for number, (at_s, each) in enumerate(zip(times, drawn, strict=True)):
            # Those of a group have the tenant and the priority of the first.
            first = ordered[-1] if ordered and at_s == times[number - 1] else None
            job = each.job if first is None else replace(each.job, tenant=first.job.tenant, priority=first.job.priority)
            ordered.append(replace(each, job=replace(job, submitted_s=at_s)))
        return ordered

    def _draw(self, number: int, dice: random.Random) -> TraceJob:
        gpus = dice.choices(list(SIZES), [share for share, _ in SIZES.values()])[0]
        planned_s = min(MAX_RUN_S, dice.lognormvariate(math.log(SIZES[gpus][1]) - SIGMA**2 / 2, SIGMA))
        planned_s = max(10.0, planned_s)
        interruptions = _poisson(planned_s * gpus / GPU_S_BETWEEN_INTERRUPTIONS, dice)
        planned_s += sum(dice.uniform(0, CHECKPOINT_EVERY_S) + RESTART_S for _ in range(interruptions))
        run_s = planned_s * (dice.random() if dice.random() < FAILED + CANCELLED else 1.0)
        wanted_s = planned_s * dice.uniform(1.2, 4.0)
        limit_s = next((limit for limit in LIMITS_S if limit >= wanted_s), LIMITS_S[-1])
        counts: tuple[int, ...] = (gpus,)
        if gpus >= 4 and dice.random() < self.elastic:
            counts = (gpus // 4, gpus // 2, gpus)
        tenant = dice.choices(range(self.tenants), [1 / (rank + 1) for rank in range(self.tenants)])[0]
        job = Job(
            id=f"job-{number:05}",
            tenant=f"tenant-{tenant}",
            worker=WORKER,
            worker_counts=counts,
            priority=dice.choices((HIGH, NORMAL, LOW), (0.1, 0.7, 0.2))[0],
            submitted_s=0.0,
            time_limit_s=limit_s * counts[-1] / counts[0],
            checkpoint_cost_s=CHECKPOINT_COST_S,
        )
        return TraceJob(job=job, run_s=max(1.0, run_s))


def _submissions(jobs: int, span_s: float, dice: random.Random) -> list[float]:
    """Times of submission, ascending, groups at once."""
    times: list[float] = []
    while len(times) < jobs:
        at_s = dice.uniform(0, span_s)
        if dice.random() < activity(at_s):
            times += [at_s] * min(_geometric(GROUP_MEAN, dice), jobs - len(times))
    return sorted(times)


def activity(at_s: float) -> float:
    """Rate of submissions at a time of day, as a share of the peak's."""
    phase = math.cos((at_s % DAY_S / HOUR_S - PEAK_HOUR) / 24 * 2 * math.pi)
    low = 1 / PEAK_TO_TROUGH
    return low + (1 - low) * (phase + 1) / 2


def serving(span_s: float, seed: int = 0, scale: float = 1.0) -> list[tuple[float, ServingDemand]]:
    """Demand over time of two models: 8 to 24 replicas by the time of day (an assumption), and bursts of 16 more for 20 to 60
    minutes, 4 a day for each, all times `scale`; the replicas needed change every 10 minutes.
    """
    dice = random.Random(seed)
    changes = []
    for model in ("chat", "code"):
        bursts = [
            (start_s := dice.uniform(0, span_s), start_s + dice.uniform(1200, 3600))
            for _ in range(int(4 * span_s / DAY_S))
        ]
        steps = {float(at_s) for at_s in range(0, int(span_s), 600)} | {edge for burst in bursts for edge in burst}
        for at_s in sorted(steps):
            extra = 16 * sum(start_s <= at_s < end_s for start_s, end_s in bursts)
            replicas = round(scale * (8 + 24 * (activity(at_s) - 1 / PEAK_TO_TROUGH) + extra))
            changes.append(
                (at_s, ServingDemand(app="app", model=model, replicas=replicas, replica=SERVING_REPLICA, priority=100))
            )
    return sorted(changes, key=lambda change: (change[0], change[1].model))


def _poisson(mean: float, dice: random.Random) -> int:
    count, left = 0, math.exp(-mean)
    product = dice.random()
    while product > left:
        count += 1
        product *= dice.random()
    return count


def _geometric(mean: float, dice: random.Random) -> int:
    count = 1
    while dice.random() > 1 / mean:
        count += 1
    return count
