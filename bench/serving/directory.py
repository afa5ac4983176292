"""Cost of the directory in a large fleet: bytes for each gateway, CPU, and staleness of the gateways' data.

    python -m bench.serving.directory [--replicas 1000] [--gateways 10] [--rounds 3] [--json FILE] [--check] [--smoke]

One Ray actor runs Tandem's directory; `--replicas` simulated replicas with `--adapters` adapters each report to it through the
code that real ones use, and `--gateways` gateways follow it with their real fleet and router. Every second each replica's load
and two of its slots differ, and `--loads` adapters are loaded over the fleet. The peer is the directory as it was: whole records
and whole snapshots, by calls of a Ray actor (`bench.serving.directory_peer`). On a machine with few cores the peer cannot keep
up: its figures then are those of a directory and gateways that do nothing else.

Ages are taken on one machine's clock, so the network adds its own delay to them. The actor's CPU is that of its whole process,
Ray's threads included.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness.machine import machine
from bench.harness.options import options_parser
from bench.harness.report import Rounds, Verdict, judge, markdown_table, show, verdict_lines, write

BAR_BYTES_PER_S = 2.0**20
BAR_CPU = 0.05
BAR_STALENESS_S = 1.5
SCHEMES = {"changes": "Tandem: changes", "snapshots": "peer: whole snapshots"}
SETTLING_S = 3.0
ROOT = Path(__file__).parents[2]


def main() -> int:
    """Measure; 1 if a bar is missed and --check is given."""
    parser = options_parser(__doc__, smoke="one round of 2 s with 40 replicas and 2 gateways")
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--adapters", type=int, default=32, help="of each replica")
    parser.add_argument("--gateways", type=int, default=10)
    parser.add_argument("--loads", type=float, default=200.0, help="adapter loads per second over the fleet")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.smoke:
        options.replicas, options.gateways, options.loads, options.seconds, options.rounds = 40, 2, 20.0, 2.0, 1
    machine_info, rounds = machine(), Rounds(options.json)
    for number in range(options.rounds):
        order = list(SCHEMES) if number % 2 == 0 else list(reversed(SCHEMES))
        rounds.append({scheme: run_round(scheme, options) for scheme in order})
    figures = {scheme: summarise([result[scheme] for result in rounds]) for scheme in SCHEMES}
    title = (
        f"{options.replicas} replicas with {options.adapters} adapters, {options.gateways} gateways, "
        f"{options.loads:g} adapter loads/s; medians of {options.rounds} rounds of {options.seconds:g} s"
    )
    columns = ("what", *SCHEMES.values())
    cells = [(name, *(form(figures[scheme][name]) for scheme in SCHEMES)) for name, form in ROWS.items()]
    show(title, columns, cells)
    results = verdicts(figures["changes"])
    page = (
        f"# What the directory costs\n\nMade by `python -m bench.serving.directory --json ...`. {title}.\n\n"
        f"{markdown_table(columns, cells)}\n\n{verdict_lines(results)}\n"
    )
    write(options.json, {"machine": machine_info, "options": measured_options(options), "rounds": rounds}, page)
    return judge(results, check=options.check)


def measured_options(arguments: Any) -> dict[str, Any]:
    """The options, for the file."""
    return {key: value for key, value in vars(arguments).items() if key not in ("json", "check", "smoke")}


def run_round(scheme: str, arguments: Any) -> dict[str, Any]:
    """One measurement of one scheme, on a cluster of its own."""
    from tandem import settings
    from tandem.cluster.local import local_cluster

    with tempfile.TemporaryDirectory() as folder:
        settings.export({"TANDEM_HOME": folder}, override=True)
        with local_cluster(num_cpus=4) as cluster:
            import ray

            paths = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
            ray.init(
                address=cluster.address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {"PYTHONPATH": paths}},
            )
            try:
                return measure(ray, scheme, arguments)
            finally:
                ray.shutdown()


def measure(ray: Any, scheme: str, arguments: Any) -> dict[str, Any]:
    """The figures of one scheme; `ray` is connected."""
    from bench.serving.directory_peer import SnapshotDirectory
    from bench.serving.directory_world import ChangesDirectory, Gateways, Replicas

    def actor(kind: type, *args: Any) -> Any:
        return ray.remote(num_cpus=0, max_concurrency=10_000)(kind).remote(*args)

    directory = actor(ChangesDirectory if scheme == "changes" else SnapshotDirectory)
    replicas = actor(Replicas, scheme, directory, arguments.replicas, arguments.adapters)
    ray.get(replicas.start.remote(), timeout=300)
    gateways = actor(Gateways, scheme, directory, arguments.gateways)
    ray.get(gateways.start.remote(arguments.replicas), timeout=300)
    ray.get(replicas.load.remote(arguments.loads))
    time.sleep(SETTLING_S)
    cpu_before, start_time = ray.get([directory.cpu_s.remote(), replicas.cpu_s.remote()]), time.monotonic()
    figures = ray.get(gateways.measure.remote(arguments.seconds), timeout=arguments.seconds + 300)
    cpu_after, wall = ray.get([directory.cpu_s.remote(), replicas.cpu_s.remote()]), time.monotonic() - start_time
    staleness, ages = figures.pop("staleness_s"), figures.pop("load_ages_s")
    return {
        **figures,
        "cpu": (cpu_after[0] - cpu_before[0]) / wall,
        "replicas_cpu": (cpu_after[1] - cpu_before[1]) / wall,
        "staleness_s": percentiles(staleness),
        "load_age_s": percentiles(ages),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """The median and the 99th percentile; infinity of nothing."""
    if len(values) < 2:
        return {"p50": float("inf"), "p99": float("inf")}
    return {"p50": statistics.median(values), "p99": statistics.quantiles(values, n=100)[98]}


ROWS: dict[str, Callable[[float], str]] = {
    "KiB/s for each gateway": lambda value: f"{value / 1024:.0f}",
    "directory, share of a core": lambda value: f"{value:.1%}",
    "a load known to every gateway after, p50, s": lambda value: f"{value:.2f}",
    "a load known to every gateway after, p99, s": lambda value: f"{value:.2f}",
    "loads that every gateway knew in the end": lambda value: f"{value:.1%}",
    "age of what a gateway knows of requests, p99, s": lambda value: f"{value:.2f}",
    "each gateway, share of a core": lambda value: f"{value:.1%}",
    "all replicas together, share of a core": lambda value: f"{value:.1%}",
}


def summarise(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the rounds, by the names of `ROWS`."""

    def median(read: Any) -> float:
        return float(statistics.median(read(result) for result in rounds))

    values = (
        median(lambda result: result["bytes_per_s"]),
        median(lambda result: result["cpu"]),
        median(lambda result: result["staleness_s"]["p50"]),
        median(lambda result: result["staleness_s"]["p99"]),
        median(lambda result: result["known_to_all"] / max(1, result["loads"])),
        median(lambda result: result["load_age_s"]["p99"]),
        median(lambda result: result["cpu_each"]),
        median(lambda result: result["replicas_cpu"]),
    )
    return dict(zip(ROWS, values, strict=True))


def verdicts(figures: dict[str, float]) -> list[Verdict]:
    """Tandem's figures against the bars."""
    bytes_per_s, cpu, _, staleness_s, *_ = figures.values()
    return [
        Verdict(
            bytes_per_s <= BAR_BYTES_PER_S,
            BAR_BYTES_PER_S / max(1.0, bytes_per_s),
            f"each gateway gets {bytes_per_s / 1024:.0f} KiB/s (bar {BAR_BYTES_PER_S / 1024:.0f})",
        ),
        Verdict(
            cpu <= BAR_CPU, BAR_CPU / max(1e-6, cpu), f"the directory takes {cpu:.1%} of a core (bar {BAR_CPU:.0%})"
        ),
        Verdict(
            staleness_s <= BAR_STALENESS_S,
            BAR_STALENESS_S / max(1e-6, staleness_s),
            f"99 of 100 loads are known to every gateway within {staleness_s:.2f} s (bar {BAR_STALENESS_S:g})",
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
