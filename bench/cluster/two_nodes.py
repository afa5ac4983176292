"""Training over two nodes: Tandem's job under Slurm and Ray, and the same loop under torchrun on the same hosts.

    python -m bench.cluster.two_nodes [--rounds 3] [--steps 60] [--json FILE] [--check] [--smoke]

Two hosts in network namespaces with a worker each, DDP over gloo through their network, the model and rows of
bench.training.train_overhead. `loop` is Tandem's training loop by `torchrun --nnodes 2`, without Ray; `tandem` is `tandem slurm
submit train --nodes 2`. Steady tokens/s is the median over steps after the first ones, a share the median over rounds of the
ratio inside a round.

`--check` exits 1 if Tandem is below 0.93 of the loop, or its losses are not the loop's within 1e-3.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.cluster.common import exit_status
from bench.harness import report
from bench.harness.hosts import REPOSITORY, SUBNET, Host, wait_until
from bench.harness.machine import machine
from bench.harness.options import options_parser
from bench.harness.postgresql import postgresql
from bench.harness.report import Verdict
from bench.harness.slurm_site import Site, slurm_site
from bench.training.train_overhead import (
    LOSS_BAR,
    largest_loss_difference,
    peer_steps,
    prepare,
    tandem_config,
    tandem_steps,
    tokens_per_s,
)

BAR = 0.93
RUN_S = 600.0
COLUMNS = ("training", "tokens/s", "least", "most", "of the loop")
VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "eth0",
    # torchrun's processes run at niceness 0 and Ray's at 15: beside other work, that is what would be measured.
    "RAY_worker_niceness": "0",
}


def main() -> int:
    """Measure; 1 if the bar is missed and --check is given."""
    parser = options_parser(__doc__, smoke="one round of few steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16, help="rows in a step, over both nodes")
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.steps = 1, 20
    rounds = report.Rounds(options.json)
    with (
        tempfile.TemporaryDirectory(prefix="tb-", dir="/tmp") as name,
        slurm_site(Path(name), nodes=2) as site,
        postgresql(f"{SUBNET}.1") as database,
    ):
        prepare(site.shared, options)
        variables = {**VARIABLES, "TANDEM_DATABASE_URL": database.create("tandem")}
        site.tandem("db", "upgrade", **variables)
        for number in range(options.rounds):
            runs = {"loop": lambda: loop(site, options), "tandem": lambda: tandem(site, options, variables, number)}  # noqa: B023
            order = list(runs) if number % 2 == 0 else list(runs)[::-1]
            measured = {name: runs[name]() for name in order}
            rounds.append(measured)
            print({name: round(figures["tokens_per_s"]) for name, figures in measured.items()}, file=sys.stderr)
    return say(rounds, options)


def say(rounds: report.Rounds, options: argparse.Namespace) -> int:
    """Print and write the figures; returns the exit status."""
    speeds = {name: [each[name]["tokens_per_s"] for each in rounds] for name in ("loop", "tandem")}
    shares = [each["tandem"]["tokens_per_s"] / each["loop"]["tokens_per_s"] for each in rounds]
    share, off = statistics.median(shares), max(loss_difference(each) for each in rounds)
    rows = [
        [name, *(f"{value:,.0f}" for value in (statistics.median(speed), min(speed), max(speed))), ""]
        for name, speed in speeds.items()
    ]
    rows[1][-1] = f"{share:.3f}"
    verdicts = [
        Verdict(share >= BAR, share / BAR, f"Tandem has {share:.3f} of the loop's tokens/s; the bar is {BAR}"),
        Verdict(off <= LOSS_BAR, LOSS_BAR / max(off, 1e-12), f"losses differ by {off:.1e}; the bar is {LOSS_BAR:.0e}"),
    ]
    report.show("Training over two nodes, medians", COLUMNS, rows)
    page = "# Training over two nodes\n\nMade by `python -m bench.cluster.two_nodes --json ...`.\n\n"
    page += f"{report.markdown_table(COLUMNS, rows)}\n\n{report.verdict_lines(verdicts)}\n"
    report.write(options.json, {"machine": machine(), "shares": shares, "rounds": list(rounds)}, page)
    return report.judge(verdicts, check=options.check)


def loss_difference(measured: dict[str, Any]) -> float:
    """How far the two runs' losses of a round are apart, at most."""
    return largest_loss_difference(measured["tandem"]["losses"], measured["loop"]["losses"])


def figures(steps: tuple[list[float], list[float]], options: argparse.Namespace) -> dict[str, Any]:
    """What is kept of a run."""
    return {"tokens_per_s": tokens_per_s(steps[0], options.batch * options.length), "losses": steps[1]}


def config(site: Site, options: argparse.Namespace, name: str) -> dict[str, Any]:
    """The job. More than half of a node's CPUs for each worker, so that each node has one."""
    values = tandem_config("ddp", site.shared, options)
    return {**values, "name": name, "parallel": {**values["parallel"], "cpus_per_worker": 1.5}}


def loop(site: Site, options: argparse.Namespace) -> dict[str, Any]:
    """Tandem's loop by torchrun on both hosts."""
    plan = {"steps": options.steps, "batch": options.batch, "config": config(site, options, "bench")}
    (site.shared / "plan.json").write_text(json.dumps(plan))
    (site.shared / "said.json").unlink(missing_ok=True)
    exports = " ".join(f"{name}={value}" for name, value in VARIABLES.items())

    def run(rank: int, host: Host) -> None:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1",
            f"--master-addr={site.nodes[0].address}", "--master-port=29517", "--module", "bench.training.peers", "loop", "ddp",
            str(site.shared),
        ]  # fmt: skip
        path = f"cd {REPOSITORY} && PYTHONPATH={REPOSITORY}/platform:{REPOSITORY} {exports}"
        host.run(f"{path} {shlex.join(command)}", timeout_s=RUN_S)

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(run, rank, host) for rank, host in enumerate(site.nodes)]:
            done.result()
    return figures(peer_steps(site.shared), options)


def tandem(site: Site, options: argparse.Namespace, variables: dict[str, str], number: int) -> dict[str, Any]:
    """The same as a job on both nodes."""
    # A job of another name is another job: one that is finished would not run again.
    name = f"bench{number}"
    path = site.shared / f"{name}.yaml"
    path.write_text(json.dumps(config(site, options, name)))
    site.tandem("slurm", "submit", "train", "--nodes", "2", "--config", str(path), **variables)
    wait_until(lambda: not site.slurm.run("squeue", "--noheader").strip(), RUN_S, "the job did not end")
    (folder,) = (site.home / "jobs").glob(f"{name}-*")
    return figures(tandem_steps(folder), options)


if __name__ == "__main__":
    sys.exit(exit_status(main))
