"""Cost of faults in an app under load: its processes are killed at random, and every answer is checked.

    python -m bench.serving.chaos_serve [--minutes 5] [--every 15] [--apart] [--engine NAME] [--smoke] [--json FILE] [--check]

An app with two engine replicas and two gateways, on a cluster of two nodes, is asked by eight clients, half of them streaming.
Every `--every` seconds one fault is done to it, drawn by the seed: an engine's process killed (SIGKILL) or stopped (SIGSTOP), a
replica, a gateway, Serve's controller or HAProxy killed, or the second node with all that runs there; with `--apart`, not before
all parts are there again. Where nothing took their request, or a 429 or 503 says when, clients send it again, a second later at
most and for up to two minutes; how often is printed. Any other end of a request is a failure.

`--check` exits 1 unless every answer was right, nothing hung, and each failed request was under way on a part that was hit: a
replica or gateway by the headers of its answer; one without an answer's head on any that was hit, or HAProxy. Printed for each
kind of fault: requests that failed, the longest time in which no answer ended (until the next fault), and how long until all
parts were there again. Where faults overlap, so do these times.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import signal
import statistics
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil

from bench.harness import report
from bench.harness.nodes import Node
from bench.harness.options import options_parser
from bench.harness.report import Verdict
from bench.serving.chaos_app import GATEWAYS, REPLICAS, listener, records, serving, title
from bench.serving.chaos_clients import CLIENTS, PATIENCE_S, Clients, RequestRecord

BOOKS_S = 2.0
BACK_S = 180.0
"""A part that is not there again by then will not come."""
AFTER_S = 5.0
CARRIED_S = 30.0
"""A request that was under way when something was hit fails within this time, or for another reason."""
ALL = "*"
"""Stands for every part."""
FAULTS = ("engine killed", "engine stopped", "replica killed", "gateway killed", "controller killed", "HAProxy killed",
          "node killed")  # fmt: skip
CARRIES_HEADLESS = ("gateway killed", "HAProxy killed", "node killed")
"""What may carry a request whose answer has not begun."""


@dataclass(slots=True)
class Fault:
    """One thing that was done to the app."""

    kind: str
    at: float
    replica: str = ""
    """The engine replica that was hit, if it was just one."""
    parts: list[str] = field(default_factory=list)
    """All replicas and gateways that were hit."""
    recovered_s: float | None = None
    failed: int = 0
    refused: int = 0
    silence_s: float = 0.0


class Chaos:
    """Does the faults, and watches the app recover; in a thread of its own, beside the clients' loop."""

    def __init__(self, cluster: Any, node: Node, url: str, kinds: list[str], options: argparse.Namespace) -> None:
        self.faults: list[Fault] = []
        self.left_out: list[str] = []
        """Faults that were skipped because their target did not run."""
        self._cluster, self._node, self._url = cluster, node, url
        self._plan = kinds
        self._log = report.Rounds(options.json)
        self._every_s, self._min_gap_s = options.every, options.apart
        self._dice = random.Random(options.seed)
        self._gateways: dict[int, str] = {}
        """By process."""

    def run(self) -> None:
        """All faults, one every so many seconds, then the last recovery."""
        start_time = time.monotonic()
        self._healthy_replicas()
        for number, kind in enumerate(self._plan):
            if self._min_gap_s:
                self._watch(until=time.monotonic() + BACK_S, back=True)
            self._watch(until=start_time + number * self._every_s)
            fault, until = Fault(kind, 0.0), time.monotonic() + self._every_s
            while not (done := self._try(fault)) and time.monotonic() < until:
                # What it is meant for is not there: as soon as it is.
                self._watch(until=time.monotonic() + 0.5)
            if not done:
                self.left_out.append(kind)
                continue
            self.faults.append(fault)
            self._log.append({"fault": kind, "at_s": round(fault.at - start_time, 1), "replica": fault.replica})
            print(f"{fault.at - start_time:5.0f} s: {kind} {fault.replica}", file=sys.stderr, flush=True)
        self._watch(until=time.monotonic() + BACK_S, back=True)
        # What clients get after all of it is a part of the account.
        time.sleep(AFTER_S)

    def _watch(self, until: float, *, back: bool = False) -> None:
        while (now := time.monotonic()) < until:
            open_faults = [fault for fault in self.faults if fault.recovered_s is None]
            # What was just killed may still be in everybody's books.
            settled = [fault for fault in open_faults if now - fault.at > BOOKS_S]
            if settled and (replicas := self._healthy_replicas()):
                for fault in settled:
                    if not replicas & set(fault.parts):
                        fault.recovered_s = round(now - fault.at, 1)
            if back and not open_faults:
                return
            time.sleep(0.3)

    def _healthy_replicas(self) -> set[str]:
        """The replicas and gateways, if every part is there by Serve's and by the app's own account; else none."""
        from ray.serve.context import _get_global_client

        with contextlib.suppress(Exception):
            client: Any = _get_global_client()
            deployments = client.get_serve_details()["applications"]["tandem"]["deployments"]
            up = {
                name: [r for r in deployment["replicas"] if r["state"] == "RUNNING"]
                for name, deployment in deployments.items()
            }
            self._gateways.update({deployment["pid"]: deployment["replica_id"] for deployment in up["Gateway"]})
            running = {name: len(replicas) for name, replicas in up.items()}
            engines = sum(count for name, count in running.items() if name.startswith("engine-"))
            import httpx

            ready = httpx.get(f"{self._url}/health", timeout=2).json()["ready_replicas"]
            ready_now = {record.id for record in records() if record.state == "ready"}
            healthy = (
                engines == REPLICAS == sum(ready.values())
                and running["Gateway"] == GATEWAYS
                and len(ready_now) == REPLICAS
                and all(deployment["status"] == "HEALTHY" for deployment in deployments.values())
            )
            return ready_now | {deployment["replica_id"] for deployment in up["Gateway"]} if healthy else set()
        return set()

    def _try(self, fault: Fault) -> bool:
        try:
            self._do(fault)
        except IndexError:
            return False
        fault.at = time.monotonic()
        return True

    def _do(self, fault: Fault) -> None:
        if fault.kind == "node killed":
            pids = {process.pid for process in self._node.processes()}
            candidates = [(record.id, process.pid) for record in records() if (process := listener(record)) is not None]
            fault.parts = [replica for replica, pid in candidates if pid in pids]
            fault.parts += [gateway for pid, gateway in self._gateways.items() if pid in pids]
            self._node.kill()
            threading.Timer(4.0, self._node.start).start()
            return
        if fault.kind in ("engine killed", "engine stopped", "replica killed"):
            record, process = self._dice.choice([(r, p) for r in records() if (p := listener(r)) is not None])
            fault.replica, fault.parts = record.id, [record.id]
            if fault.kind != "replica killed":
                # An echo engine is the replica itself.
                process = next((p for p in process.children(recursive=True) if "EngineCore" in title(p)), process)
            process.send_signal(signal.SIGSTOP if fault.kind == "engine stopped" else signal.SIGKILL)
            return
        name = {
            "gateway killed": "ray::ServeReplica:tandem:Gateway",
            "controller killed": "ray::ServeController",
            "HAProxy killed": "haproxy",
        }[fault.kind]
        process = self._dice.choice([p for p in self._cluster_processes() if title(p).startswith(name)])
        fault.parts = {"gateway killed": [self._gateways.get(process.pid, "?")], "HAProxy killed": [ALL]}.get(
            fault.kind, []
        )
        process.kill()

    def _cluster_processes(self) -> list[psutil.Process]:
        from tandem.cluster.marks import marked_processes

        # A haproxy that gave its listeners to the next one is none of the app's parts any more.
        processes = sorted(marked_processes(self._cluster.mark), key=lambda p: p.create_time())
        haproxies = [p for p in processes if title(p).startswith("haproxy")]
        return [p for p in processes if p not in haproxies[:-1]]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run clients and faults."""
    dice = random.Random(options.seed)
    count = max(len(FAULTS), int(60 * options.minutes / options.every)) if not options.smoke else len(FAULTS)
    # Each kind as often as the others, in an order of its own.
    kinds = [kind for _ in range(1 + count // len(FAULTS)) for kind in dice.sample(FAULTS, len(FAULTS))][:count]
    kinds = options.faults or kinds
    with serving(options.engine) as (cluster, node, url):
        clients = Clients(url, "tiny")
        thread = threading.Thread(target=lambda: asyncio.run(clients.run()), daemon=True)
        thread.start()
        while len(clients.requests) < 2 * CLIENTS:
            time.sleep(0.1)
        chaos = Chaos(cluster, node, url, kinds, options)
        start_time = time.monotonic()
        chaos.run()
        lasted_s = time.monotonic() - start_time
        clients.over = True
        thread.join(PATIENCE_S + 10)
    assign_outcomes(chaos.faults, clients.requests)
    failures = [request for request in clients.requests if request.outcome != "right"]
    return {
        "engine": options.engine, "seed": options.seed, "every_s": options.every, "apart": options.apart,
        "seconds": round(lasted_s), "cores": os.cpu_count(), "left_out": chaos.left_out, "requests": len(clients.requests),
        "refused": sum(len(request.refused) for request in clients.requests),
        "answered_after": sum(request.outcome == "right" and request.began > chaos.faults[-1].at for request in clients.requests),
        "failed": len(failures), "wrong": sum(request.outcome.startswith("wrong") for request in failures),
        "hung": sum(request.outcome == "hung" for request in failures),
        "unexplained": [asdict(request) for request in failures if find_cause(request, chaos.faults) is None],
        "failures": [asdict(request) for request in failures], "faults": [asdict(fault) for fault in chaos.faults],
    }  # fmt: skip


def find_cause(request: RequestRecord, faults: list[Fault]) -> Fault | None:
    """The fault that a failed request was under way for, on the part that was hit."""
    for fault in faults:
        carriers = {request.replica, request.gateway, ALL} - {""}
        headless = fault.kind in CARRIES_HEADLESS and not request.gateway
        if (
            (headless or carriers & set(fault.parts))
            and request.began <= fault.at + 0.5
            and fault.at - 0.5 <= request.ended <= fault.at + CARRIED_S
        ):
            return fault
    return None


def assign_outcomes(faults: list[Fault], requests: list[RequestRecord]) -> None:
    """Fill in the cost of each fault: failed and refused requests, and the time without answers."""
    answer_times = sorted(request.ended for request in requests if request.outcome == "right")
    for fault, next_fault in zip(faults, [*faults[1:], None], strict=True):
        until = answer_times[-1] if next_fault is None else min(next_fault.at, answer_times[-1])
        fault.refused = sum(fault.at <= at < until for request in requests for at, _ in request.refused)
        fault.failed = sum(request.outcome != "right" and find_cause(request, faults) is fault for request in requests)
        boundaries = [fault.at, *(end for end in answer_times if fault.at < end <= until), until]
        fault.silence_s = round(max(b - a for a, b in itertools.pairwise(boundaries)), 1)


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row for each kind of fault."""
    rows = []
    for kind in FAULTS:
        these = [fault for fault in results["faults"] if fault["kind"] == kind]
        if these:
            recoveries_s = [fault["recovered_s"] for fault in these if fault["recovered_s"] is not None]
            silences_s = [fault["silence_s"] for fault in these]
            recovery = "not within 180"
            if len(recoveries_s) == len(these):
                recovery = f"{statistics.median(recoveries_s):.1f} ({max(recoveries_s):.1f})"
            rows.append([
                kind, str(len(these)), str(sum(fault["failed"] for fault in these)),
                str(sum(fault["refused"] for fault in these)),
                f"{statistics.median(silences_s):.1f} ({max(silences_s):.1f})",
                recovery,
            ])  # fmt: skip
    return ["fault", "times", "failed requests", "refusals, sent again", "longest without an answer, s: median (most)",
            "until all was there again, s: median (most)"], rows  # fmt: skip


def verdicts(results: dict[str, Any]) -> list[Verdict]:
    """The bars."""
    unexplained, back = results["unexplained"], all(f["recovered_s"] is not None for f in results["faults"])
    return [
        Verdict(not results["wrong"], float(not results["wrong"]), f"{results['wrong']} wrong answers of {results['requests']}"),
        Verdict(not results["hung"], float(not results["hung"]), f"{results['hung']} requests hung"),
        Verdict(not unexplained, float(not unexplained),
                f"{len(unexplained)} of {results['failed']} failed requests were not under way on what was hit"),
        Verdict(back, float(back), "all parts were there again after each fault, without help"),
        Verdict(not results["left_out"], float(not results["left_out"]), f"{len(results['left_out'])} faults could not be done"),
        Verdict(results["answered_after"] > 0, float(results["answered_after"] > 0),
                f"{results['answered_after']} requests were sent and answered after the last fault"),
    ]  # fmt: skip


def main() -> int:
    """Run it; 1 if a bar is missed and --check is given."""
    parser = options_parser(__doc__, smoke="each fault once")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--every", type=float, default=15.0, help="seconds between faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("vllm", "echo"), default="vllm")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, help="these, in this order, and no others")
    parser.add_argument(
        "--apart", action="store_true", help="each fault when all parts are there again after the one before"
    )
    options = parser.parse_args()
    results = measure(options)
    columns, rows = table(results)
    report.show("Faults under load", columns, rows)
    for failure in results["failures"]:
        print(f"  {failure['outcome']}")
    page = "# Faults under load\n\nMade by `python -m bench.serving.chaos_serve --json ...`: "
    page += f"{REPLICAS} replicas ({results['engine']}), "
    every = "each when all is there again" if results["apart"] else f"one every {results['every_s']:g} s"
    page += f"{GATEWAYS} gateways, {CLIENTS} clients, {results['requests']} requests in {results['seconds']} s, "
    page += f"{len(results['faults'])} faults, {every}.\n\n{report.markdown_table(columns, rows)}\n\n"
    page += f"{report.verdict_lines(verdicts(results))}\n"
    report.write(options.json, results, page)
    return report.judge(verdicts(results), check=options.check)


if __name__ == "__main__":
    sys.exit(main())
