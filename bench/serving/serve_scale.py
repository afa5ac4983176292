"""Capacity of the gateway with engines that cost almost nothing: requests and chunks for each core that it uses.

    python -m bench.serving.serve_scale [--rounds 3] [--json FILE] [--check]

A gateway's cost is the CPU time of its own process (user and system), so it says the same on a machine that shares its cores;
the proxy in front (HAProxy) is shown beside it. The bar is on how the cost of one request grows with the streams.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from bench.harness import report
from bench.harness.machine import machine
from bench.harness.options import options_parser
from bench.harness.report import Verdict
from bench.harness.servers import ECHOES, drive, freeze, members, resumed_stack, stack

STREAMS = (1, 8, 64, 512)
TOKENS = 32
"""Of each answer: the echo engine gives the prompt's words back."""
REQUESTS = 1024
"""Of each measurement, over all its streams."""
GROWTH = 1.10
"""The most that a request may cost the gateway at any number of streams, as a share of what one costs alone."""
PER_CORE = {"streamed": 2393, "whole": 3319}
"""Requests/s a core at BEST_STREAMS, one gateway, as measured before there were keys, limits, usage records and an access log."""
BEST_STREAMS = 8
COLUMNS = (
    "stack",
    "answers",
    "streams",
    "requests/s",
    "requests/s a core",
    "chunks/s a core",
    "cost of a request",
    "proxy ms",
)


def main() -> int:
    """Measure; 1 if the bar is missed and --check is given."""
    parser = options_parser(__doc__, smoke="one round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.smoke:
        options.rounds = 1
    results = report.Rounds(options.json)
    with contextlib.ExitStack() as exit_stack:
        folder = Path(exit_stack.enter_context(tempfile.TemporaryDirectory(prefix="tb-", dir="/tmp")))
        ports = {}
        for name in ECHOES:
            ports[name] = exit_stack.enter_context(stack(name, folder))
            freeze(name, True)
        for number in range(options.rounds):
            for name in ECHOES if number % 2 else reversed(ECHOES):
                with resumed_stack(name, ports[name]):
                    loads = [(streams, whole) for streams in STREAMS for whole in (False, True)]
                    for load in loads:
                        results.append({"round": number, **measure(name, ports[name], *load)})
    summary = summarise(results)
    rows = [cells(row) for row in summary]
    verdicts = [per_core(summary, mode) for mode in PER_CORE]
    verdicts += [growth(summary, name, mode) for name in ECHOES for mode in ("streamed", "whole")]
    verdicts += [Verdict(False, 0.0, f"{r['stack']}: failed {r['failed']}") for r in results if r["failed"]]
    report.show("The gateway's capacity, medians", COLUMNS, rows, names=2, width=140)
    page_header = "# The gateway's capacity\n\nMade by `python -m bench.serving.serve_scale --json ...`."
    page = f"{page_header}\n\n{report.markdown_table(COLUMNS, rows)}\n\n{report.verdict_lines(verdicts)}\n"
    report.write(options.json, {"machine": machine(), "summary": summary, "rounds": results}, page)
    return report.judge(verdicts, check=options.check)


def measure(name: str, port: int, streams: int, whole: bool) -> dict[str, Any]:
    """One load, and the CPU time that gateways and proxy took for it."""
    gateways = [p for p in members(name) if "Gateway" in " ".join(p.cmdline())]
    proxies = [p for p in members(name) if p.name() == "haproxy"]
    cpu_before = cpu_s(gateways), cpu_s(proxies)
    figures = drive(port, streams, TOKENS, whole=whole, requests=max(1, REQUESTS // streams), prompt="word " * TOKENS)
    gateway_cpu_s, proxy_cpu_s = cpu_s(gateways) - cpu_before[0], cpu_s(proxies) - cpu_before[1]
    requests = figures["requests"]
    return {
        "stack": name,
        "mode": "whole" if whole else "streamed",
        "streams": streams,
        "requests_per_s": requests / figures["seconds"],
        "requests_per_core_s": requests / gateway_cpu_s,
        "chunks_per_core_s": figures["events"] / gateway_cpu_s,
        "request_ms": 1000 * gateway_cpu_s / requests,
        "proxy_ms": 1000 * proxy_cpu_s / requests,
        "failed": figures["failed"],
    }


def cpu_s(processes: list[psutil.Process]) -> float:
    """CPU time of some processes so far, in seconds."""
    return sum(sum(p.cpu_times()[:2]) for p in processes)


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds, and each cost as a share of the least of its stack and kind."""
    rows = []
    for name in ECHOES:
        for mode in ("streamed", "whole"):
            of = [r for r in results if (r["stack"], r["mode"]) == (name, mode)]
            for streams in STREAMS:
                at = [r for r in of if r["streams"] == streams]
                single_stream_ms = {r["round"]: r["request_ms"] for r in of if r["streams"] == 1}
                row: dict[str, Any] = {"stack": name, "mode": mode, "streams": streams}
                for key in ("requests_per_s", "requests_per_core_s", "chunks_per_core_s", "request_ms", "proxy_ms"):
                    row[key] = round(statistics.median(r[key] for r in at), 3)
                row["of_one"] = round(statistics.median(r["request_ms"] / single_stream_ms[r["round"]] for r in at), 3)
                rows.append(row)
    return rows


def growth(summary: list[dict[str, Any]], name: str, mode: str) -> Verdict:
    """The most that a request costs, as a share of what it costs alone."""
    worst = max((r for r in summary if (r["stack"], r["mode"]) == (name, mode)), key=lambda r: r["of_one"])
    cost = f"a request costs {worst['of_one']:.2f} at {worst['streams']} streams of what it costs at 1"
    message = f"{ECHOES[name]}, {mode}: {cost} (bar {GROWTH})"
    return Verdict(worst["of_one"] <= GROWTH, GROWTH / worst["of_one"], message)


def per_core(summary: list[dict[str, Any]], mode: str) -> Verdict:
    """Requests that one gateway answers with a core to itself."""
    row = next(r for r in summary if (r["stack"], r["mode"], r["streams"]) == ("echo-1", mode, BEST_STREAMS))
    message = f"{mode}: {row['requests_per_core_s']:,.0f} requests/s a core at {BEST_STREAMS} streams (bar {PER_CORE[mode]:,})"
    return Verdict(row["requests_per_core_s"] >= PER_CORE[mode], row["requests_per_core_s"] / PER_CORE[mode], message)


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text."""
    return [
        ECHOES[row["stack"]],
        row["mode"],
        str(row["streams"]),
        f"{row['requests_per_s']:,.0f}",
        f"{row['requests_per_core_s']:,.0f}",
        f"{row['chunks_per_core_s']:,.0f}",
        f"{row['request_ms']:.2f} ms ({row['of_one']:.2f})",
        f"{row['proxy_ms']:.2f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
