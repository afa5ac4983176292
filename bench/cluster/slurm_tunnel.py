"""Tunnels to Slurm jobs: how soon they answer again after a loss, and what clients notice of a hand-over to another job.

    python -m bench.cluster.slurm_tunnel [--rounds 3] [--seconds 20] [--json FILE] [--check] [--smoke]

Two compute nodes, a login node and a laptop in network namespaces, a real Slurm. `tandem slurm tunnel` on the laptop leads to a
job that serves a model. Each round ends the tunnel's SSH connection in two ways: its process is killed, and the login node's link
is down for 8 s; the time runs from the kill, or from the link's return, to an answer at the same local port. Then clients ask on
and on while a second job succeeds the first one (`--successor-of`), for `--seconds` before and after.

`--check` exits 1 if a tunnel took more than 5 s to answer again, or a request failed in the hand-over.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from bench.cluster.common import ask, at_most, exit_status, prepare, recovers_after
from bench.harness import report
from bench.harness.hosts import wait_until
from bench.harness.machine import machine
from bench.harness.options import options_parser
from bench.harness.slurm_site import Site, slurm_site
from tandem.cluster.ports import free_ports

RECONNECT_BAR_S = 5.0
DOWN_S = 8.0
"""Long enough for ssh to notice that the host is away."""
CLIENTS = 4
TOKENS = 16
COLUMNS = ("what", "figure", "least", "most")


def main() -> int:
    """Measure; 1 if a bar is missed and --check is given."""
    parser = options_parser(__doc__, smoke="one round, few seconds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of load before and after the hand-over")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.rounds, arguments.seconds = 1, 3.0
    rounds = report.Rounds(arguments.json)
    with tempfile.TemporaryDirectory(prefix="tb-", dir="/tmp") as name, slurm_site(Path(name), nodes=2) as site:
        variables = prepare(site.shared)
        submit(site, variables)
        key, (port,) = site.job().connection().api_key, free_ports(1)
        url = f"http://127.0.0.1:{port}/v1"
        with site.tunnel(port):
            ask(url, key)
            for _ in range(arguments.rounds):
                rounds.append({"killed": after_kill(url, key), "down": after_outage(site, url, key)})
            handed_over = hand_over(site, variables, url, key, arguments.seconds)
    return say(rounds, handed_over, arguments)


def say(rounds: report.Rounds, handed_over: dict[str, Any], arguments: Any) -> int:
    """Print and write the figures; returns the exit status."""
    labels = {"killed": "answer after ssh was killed, s", "down": "answer after the link's return, s"}
    rows = [spread(label, [each[kind] for each in rounds]) for kind, label in labels.items()]
    rows += [
        ["requests in the hand-over", f"{handed_over['requests']}", "", ""],
        ["of them failed", f"{len(handed_over['failures'])}", "", ""],
        ["latency, s", f"{handed_over['median_s']:.3f}", "", f"{handed_over['most_s']:.3f}"],
    ]
    worst = max(max(each.values()) for each in rounds)
    verdicts = [
        at_most("a tunnel answers again, at most", worst, RECONNECT_BAR_S, " s"),
        at_most("failed requests in the hand-over", len(handed_over["failures"]), 0, ""),
    ]
    report.show("Tunnels to Slurm jobs", COLUMNS, rows)
    page = "# Tunnels to Slurm jobs\n\nMade by `python -m bench.cluster.slurm_tunnel --json ...`.\n\n"
    page += f"{report.markdown_table(COLUMNS, rows)}\n\n{report.verdict_lines(verdicts)}\n"
    report.write(arguments.json, {"machine": machine(), "rounds": list(rounds), "hand_over": handed_over}, page)
    return report.judge(verdicts, check=arguments.check)


def spread(label: str, seconds: list[float]) -> list[str]:
    """A row with the median, the least and the most."""
    return [label, *(f"{value:.2f}" for value in (statistics.median(seconds), min(seconds), max(seconds)))]


def submit(site: Site, variables: dict[str, str], *more: str) -> None:
    """A job that serves the model, on a node of its own; returns when it answers."""
    site.tandem("slurm", "submit", "serve", "--config", str(site.shared / "app.yaml"), *more, **variables)


def after_kill(url: str, key: str) -> float:
    """Kill the process of the tunnel's SSH connection; seconds until it answers again."""
    (master,) = [process for process in psutil.process_iter() if is_master(process)]
    since = time.monotonic()
    os.kill(master.pid, signal.SIGKILL)
    return recovers_after(url, key, since, timeout_s=60)


def is_master(process: psutil.Process) -> bool:
    """Whether a process is a tunnel's SSH connection, which commands and forwarded ports go through."""
    with contextlib.suppress(psutil.Error):
        text = " ".join(process.cmdline())
        return "/tmp/tandem-ssh-" in text and ("[mux]" in text or " -M " in text)
    return False


def after_outage(site: Site, url: str, key: str) -> float:
    """Take the login node's link down for a while; seconds from its return until the tunnel answers again."""
    link = f"v{site.login.namespace}"
    subprocess.run(["ip", "link", "set", link, "down"], check=True)
    time.sleep(DOWN_S)
    since = time.monotonic()
    subprocess.run(["ip", "link", "set", link, "up"], check=True)
    return recovers_after(url, key, since, timeout_s=60)


def hand_over(site: Site, variables: dict[str, str], url: str, key: str, seconds: float) -> dict[str, Any]:
    """Ask on and on while a second job takes over and the first one ends: requests, failures, latencies."""
    first, done = site.job(), threading.Event()
    latencies: list[float] = []
    failures: list[str] = []

    def client() -> None:
        while not done.is_set():
            began = time.monotonic()
            try:
                ask(url, key, tokens=TOKENS)
                latencies.append(time.monotonic() - began)
            except Exception as error:
                failures.append(repr(error))
            time.sleep(0.05)

    clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for each in clients:
        each.start()
    try:
        time.sleep(seconds)
        submit(site, variables, "--successor-of", first.name)
        site.tandem("slurm", "stop", first.name)
        wait_until(
            lambda: len(site.slurm.run("squeue", "--noheader").splitlines()) == 1, 120, "the first job did not end"
        )
        time.sleep(seconds)
    finally:
        done.set()
        for each in clients:
            each.join(60)
    return {
        "requests": len(latencies) + len(failures),
        "failures": failures,
        "median_s": statistics.median(latencies),
        "most_s": max(latencies),
    }


if __name__ == "__main__":
    sys.exit(exit_status(main))
