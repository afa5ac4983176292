"""The scheduler in a simulation: 10,000 training jobs on 1,000 GPUs, beside FIFO and a model of Kueue; then with serving.

    python -m bench.scheduling.scheduler_sim [--smoke] [--jobs N] [--gpus N] [--load X] [--seed N] [--json FILE] [--check]

Jobs and serving demand are drawn from published distributions (bench/scheduling/workload.py states each). The schedulers are in
bench/scheduling/schedulers.py; all place gangs by the same packing. Scenarios:

- Training: every job needs all of its GPUs.
- Training, 30 % elastic: Tandem may run these with a half or a quarter of their workers; the others run them whole.
- Serving: two models whose demand changes with the time of day and in bursts. "shared": Tandem gives GPUs to serving when it
  needs them and takes them back. "apart": as many GPUs as serving ever needs are set aside, and Tandem schedules training on the
  rest.

Figures, of the time in which jobs are submitted:

- utilisation: GPUs that training holds, as a share of those that serving does not, while any job waits.
- wait: from submission to the first start. slowdown: from submission to the end over the run time, which counts as at least 10
  minutes.
- Jain's index of the tenants' GPU-time over what max-min fair shares of their demand would give them, at most all of it.
- lost work: checkpoints and starts because of preemption and resizing.
- decision: wall time of one, on a machine that does other things as well. seconds: CPU time of the whole simulation.

The bars hold for Tandem in the first scenario. Kueue's BestEffortFIFO keeps nothing free for large jobs, so its utilisation is
higher and its large jobs starve; StrictFIFO starves nobody, and is the one to compare utilisation and waits of all jobs with.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from bench.harness import report
from bench.harness.options import options_parser
from bench.harness.report import Verdict
from bench.scheduling import workload
from bench.scheduling.schedulers import Fifo, KueueLike, Scheduler, Tandem
from bench.scheduling.simulation import CLASSES, Simulation
from bench.scheduling.workload import GPUS_PER_NODE, HOUR_S, TraceJob, Workload

SERVED_LOAD = 0.85
"""GPU-time of the jobs beside serving, as a share of what the whole cluster has."""
JAIN_BAR = 0.95
SECONDS_BAR = 60.0
"""CPU time for 10,000 jobs on 1,000 GPUs."""
DECISION_MS_BAR = 50.0
REPLICA_WAIT_BAR_S = 120.0
"""95 of 100 replicas get their GPUs within."""
TANDEM, STRICT, BEST_EFFORT = "Tandem", "Kueue-like, StrictFIFO", "Kueue-like, BestEffortFIFO"
MAKERS: dict[str, Callable[[Workload], Scheduler]] = {
    "FIFO": lambda load: Fifo(load.nodes(), load.tenant_list()),
    STRICT: lambda load: KueueLike(load.nodes(), load.tenant_list(), strict=True),
    BEST_EFFORT: lambda load: KueueLike(load.nodes(), load.tenant_list(), strict=False),
    TANDEM: lambda load: Tandem(load.nodes(), load.tenant_list()),
}
COLUMNS = (
    "scheduler", "utilisation", "wait h: mean, p50, p95, max", "slowdown: mean, p95", "Jain", "preemptions, resizes",
    "lost GPU-h", "decision ms: p50, p99", "seconds",
)  # fmt: skip
CLASS_COLUMNS = ("scheduler", *(name for name, _ in CLASSES))
SERVING_COLUMNS = (
    "GPUs",
    "replica waits s: p50, p95, max",
    "serving GPU-h",
    "training GPU-h",
    "wait h: mean, p95",
    "preemptions",
)


def main() -> int:
    parser = options_parser(__doc__, smoke="300 jobs on 160 GPUs", check="exit 1 where Tandem misses a bar")
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--gpus", type=int, default=1_000)
    parser.add_argument(
        "--load", type=float, default=0.95, help="GPU-time of the jobs, as a share of what the cluster has"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.smoke:
        options.jobs, options.gpus = 300, 160
    rounds = report.Rounds(options.json)
    results: dict[str, Any] = {"load_before": os.getloadavg()[0], "cores": os.cpu_count(), "scenarios": rounds}
    for elastic in (0.0, 0.3):
        load = Workload(jobs=options.jobs, gpus=options.gpus, load=options.load, elastic=elastic, seed=options.seed)
        scenario = compare(load)
        rounds.append(scenario)
        report.show(scenario["title"], COLUMNS, rows(scenario), width=170)
        report.show("Wait in hours by size of job: mean, p95", CLASS_COLUMNS, class_rows(scenario), width=130)
    serving = share_with_serving(
        Workload(jobs=options.jobs // 2, gpus=options.gpus, load=SERVED_LOAD, elastic=0.3, seed=options.seed),
    )
    rounds.append(serving)
    report.show(serving["title"], SERVING_COLUMNS, serving_rows(serving), width=130)
    report.write(options.json, results, page(results))
    return report.judge(verdicts(results), check=options.check and not options.smoke)


def compare(load: Workload) -> dict[str, Any]:
    """All schedulers on the same jobs."""
    trace = load.trace()
    span_days = trace[-1].job.submitted_s / workload.DAY_S
    title = f"{load.jobs:,} jobs on {load.gpus:,} GPUs in {span_days:.1f} days, {100 * load.elastic:.0f} % elastic"
    figures = {name: run(load, trace, make(load)) for name, make in MAKERS.items()}
    return {"kind": "training", "title": title, "elastic": load.elastic, "schedulers": figures}


def run(load: Workload, trace: list[TraceJob], scheduler: Scheduler) -> dict[str, Any]:
    return Simulation(load, trace, scheduler, ticks=isinstance(scheduler, Tandem)).run()


def share_with_serving(load: Workload) -> dict[str, Any]:
    """Training and serving on one cluster, and on two parts of it."""
    trace = load.trace()
    demand = workload.serving(trace[-1].job.submitted_s, load.seed, load.gpus / 1000)
    needed: dict[tuple[str, str], int] = {}
    peak = 0
    for _, each in demand:
        needed[each.key] = each.replicas
        peak = max(peak, sum(needed.values()))
    size = workload.SERVING_REPLICA.gpus
    apart_nodes = -(-peak * int(size) // GPUS_PER_NODE)
    shared = Simulation(load, trace, Tandem(load.nodes(), load.tenant_list()), ticks=True, serving=demand).run()
    rest = load.nodes()[apart_nodes:]
    # What is larger than the rest of the cluster would never run there.
    fitting = [each for each in trace if each.job.min_workers <= len(rest) * GPUS_PER_NODE]
    apart = Simulation(
        load, fitting, Tandem(rest, load.tenant_list()), ticks=True, gpus=len(rest) * GPUS_PER_NODE
    ).run()
    return {
        "kind": "serving",
        "title": f"{load.jobs:,} jobs on {load.gpus:,} GPUs beside serving, which needs up to {peak} replicas of {size:g} GPUs",
        "peak_replicas": peak,
        "span_h": trace[-1].job.submitted_s / HOUR_S,
        "apart_gpus": apart_nodes * GPUS_PER_NODE,
        "schedulers": {"shared": shared, "apart": apart},
    }


# ---- the page -------------------------------------------------------------------------------------------------------


def rows(scenario: dict[str, Any]) -> list[list[str]]:
    return [
        [
            name,
            f"{100 * figures['utilisation']:.1f}%",
            ", ".join(f"{figures[f'{key}_wait_h']:.2f}" for key in ("mean", "median", "p95", "max")),
            f"{figures['mean_slowdown']:.2f}, {figures['p95_slowdown']:.2f}",
            f"{figures['jain']:.3f}",
            f"{figures['preemptions']:,}, {figures['resizes']:,}",
            f"{figures['lost_gpu_h']:,.0f}",
            f"{figures['decision_ms']['p50']:.2f}, {figures['decision_ms']['p99']:.1f}",
            f"{figures['seconds']:.1f}",
        ]
        for name, figures in scenario["schedulers"].items()
    ]


def class_rows(scenario: dict[str, Any]) -> list[list[str]]:
    return [
        [name, *(f"{each['mean_wait_h']:.2f}, {each['p95_wait_h']:.2f}" for each in figures["classes"].values())]
        for name, figures in scenario["schedulers"].items()
    ]


def serving_rows(scenario: dict[str, Any]) -> list[list[str]]:
    lines = []
    for name, figures in scenario["schedulers"].items():
        waits = figures["replica_wait_s"]
        reserved_gpu_h = scenario["apart_gpus"] * scenario["span_h"]
        lines.append(
            [
                name,
                f"{waits['p50']:.0f}, {waits['p95']:.0f}, {waits['max']:.0f}" if name == "shared" else "0, 0, 0",
                f"{figures['serving_gpu_h'] if name == 'shared' else reserved_gpu_h:,.0f}",
                f"{figures['training_gpu_h']:,.0f}",
                f"{figures['mean_wait_h']:.2f}, {figures['p95_wait_h']:.2f}",
                f"{figures['preemptions']:,}",
            ]
        )
    return lines


def page(results: dict[str, Any]) -> str:
    introduction = (
        "Made by `python -m bench.scheduling.scheduler_sim --json ...`; its docstring states the figures, that of "
        "`bench/scheduling/workload.py` the distributions."
    )
    parts = ["# The scheduler, simulated", "", introduction, ""]
    for scenario in results["scenarios"]:
        parts.append(f"## {scenario['title']}\n")
        if scenario["kind"] == "training":
            parts += [
                report.markdown_table(COLUMNS, rows(scenario)),
                "",
                "Wait in hours by size of job: mean, p95.",
                "",
            ]
            parts += [report.markdown_table(CLASS_COLUMNS, class_rows(scenario)), ""]
        else:
            parts += [report.markdown_table(SERVING_COLUMNS, serving_rows(scenario)), "", returned(scenario), ""]
    return "\n".join([*parts, report.verdict_lines(verdicts(results)), ""])


def returned(scenario: dict[str, Any]) -> str:
    reserved_gpu_h = scenario["apart_gpus"] * scenario["span_h"]
    used_gpu_h = scenario["schedulers"]["shared"]["serving_gpu_h"]
    share = 1 - used_gpu_h / reserved_gpu_h
    return (
        f"Set aside for its peak, serving would hold {reserved_gpu_h:,.0f} GPU-hours; shared it held {used_gpu_h:,.0f}, and "
        f"{100 * share:.0f} % were returned to training."
    )


def verdicts(results: dict[str, Any]) -> list[Verdict]:
    scenarios = results["scenarios"]
    training = scenarios[0]["schedulers"]
    tandem, strict, best_effort = training[TANDEM], training[STRICT], training[BEST_EFFORT]
    large = CLASSES[-1][0]
    waits = scenarios[-1]["schedulers"]["shared"]["replica_wait_s"]
    return [
        at_least("utilisation", tandem["utilisation"], strict["utilisation"], f"that of {STRICT}"),
        at_least("utilisation", tandem["utilisation"], best_effort["utilisation"] - 0.02, f"0.02 below {BEST_EFFORT}"),
        at_most("p95 wait in hours", tandem["p95_wait_h"], strict["p95_wait_h"], f"that of {STRICT}"),
        at_most(
            f"p95 wait of jobs {large}, in hours", tandem["classes"][large]["p95_wait_h"],
            best_effort["classes"][large]["p95_wait_h"], f"that of {BEST_EFFORT}",
        ),
        at_most("mean slowdown", tandem["mean_slowdown"], best_effort["mean_slowdown"], f"that of {BEST_EFFORT}"),
        at_least("Jain's index", tandem["jain"], JAIN_BAR, "the bar"),
        at_most("CPU seconds", tandem["seconds"], SECONDS_BAR, "the bar"),
        at_most("p99 of a decision in ms", tandem["decision_ms"]["p99"], DECISION_MS_BAR, "the bar"),
        at_most("p95 wait of a replica for its GPUs in s", waits["p95"], REPLICA_WAIT_BAR_S, "the bar"),
    ]  # fmt: skip


def at_least(name: str, value: float, bar: float, meaning: str) -> Verdict:
    return Verdict(value >= bar, value / bar if bar else 1.0, f"{name} {value:.3f}, at least {meaning}, {bar:.3f}")


def at_most(name: str, value: float, bar: float, meaning: str) -> Verdict:
    return Verdict(value <= bar, bar / value if value else 1.0, f"{name} {value:.3f}, at most {meaning}, {bar:.3f}")


if __name__ == "__main__":
    raise SystemExit(main())
