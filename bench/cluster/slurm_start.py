"""From `sbatch` to the first answer: Tandem's job, and a bare vLLM server under the same kind of batch script.

    python -m bench.cluster.slurm_start [--rounds 3] [--json FILE] [--check] [--smoke]

One compute node in a network namespace, a real Slurm, the model's files on the shared file system. `tandem` is `tandem slurm
submit serve`: its batch script starts Ray, Serve, an engine and a gateway with a key. `bare` submits a script with the same
options of sbatch whose step is vLLM's own server. Both are timed from the command that submits to a chat answer, in turn, and
find what an earlier start has compiled; Tandem's start before, which found nothing, is told apart (not with --smoke).

`--check` exits 1 if Tandem's median is above 60 s, or above 1.3 of the bare server's.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.cluster.common import MODEL, answers_after, at_most, exit_status, prepare
from bench.harness import report
from bench.harness.machine import machine
from bench.harness.options import options_parser
from bench.harness.slurm_site import Site, slurm_site
from tandem.cluster.slurm.folder import JobFolder, Submission
from tandem.cluster.slurm.script import JobRequest, exports, options, preparation, source
from tandem.config.slurm import SlurmSite

BAR_S, BARE_BAR = 60.0, 1.3
TIMEOUT_S = 300.0
PORT = 8000
KEY = "bench"
COLUMNS = ("start", "seconds", "least", "most", "of bare")
NAMES = {"bare": "vLLM server, bare", "tandem": "tandem slurm submit serve"}


def main() -> int:
    """Measure; 1 if a bar is missed and --check is given."""
    parser = options_parser(__doc__, smoke="one round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.rounds = 1
    rounds = report.Rounds(arguments.json)
    with tempfile.TemporaryDirectory(prefix="tb-", dir="/tmp") as name, slurm_site(Path(name), nodes=1) as site:
        variables = prepare(site.shared)
        cold = None if arguments.smoke else tandem_start(site, variables)
        starts = [bare_start, tandem_start]
        for number in range(arguments.rounds):
            order = starts if number % 2 == 0 else starts[::-1]
            rounds.append({start.__name__.removesuffix("_start"): start(site, variables) for start in order})
            print(json.dumps(rounds[-1]), file=sys.stderr)
    shares = [each["tandem"] / each["bare"] for each in rounds]
    seconds = {name: [each[name] for each in rounds] for name in NAMES}
    rows = [row(name, seconds[name], shares) for name in NAMES]
    verdicts = [
        at_most("sbatch to the first answer", statistics.median(seconds["tandem"]), BAR_S, " s"),
        at_most("the same, as a share of bare vLLM", statistics.median(shares), BARE_BAR, ""),
    ]
    report.show("From sbatch to the first answer, medians", COLUMNS, rows)
    message = "" if cold is None else f"A start that finds nothing compiled answers after {cold:.1f} s."
    print(message)
    page = "# sbatch to the first answer\n\nMade by `python -m bench.cluster.slurm_start --json ...`.\n\n"
    page += f"{report.markdown_table(COLUMNS, rows)}\n\n{message}\n\n{report.verdict_lines(verdicts)}\n"
    results = {"machine": machine(), "cold": cold, "seconds": seconds, "shares": shares, "rounds": list(rounds)}
    report.write(arguments.json, results, page)
    return report.judge(verdicts, check=arguments.check)


def row(name: str, seconds: list[float], shares: list[float]) -> list[str]:
    """A row of the table."""
    share = f"{statistics.median(shares):.2f}" if name == "tandem" else ""
    return [NAMES[name], *(f"{value:.1f}" for value in (statistics.median(seconds), min(seconds), max(seconds))), share]


def tandem_start(site: Site, variables: dict[str, str]) -> float:
    """Seconds of Tandem's start; the job is ended afterwards."""
    since = time.monotonic()
    words = ("--config", str(site.shared / "app.yaml"), "--port", str(PORT))
    site.tandem("slurm", "submit", "serve", "--detach", *words, **variables)
    folder = site.job()
    try:
        return timed(site, lambda: folder.connection().api_key, since)
    finally:
        end(site)


def bare_start(site: Site, variables: dict[str, str]) -> float:
    """Seconds of vLLM's own server, submitted with the same options; its batch script is otherwise what people write."""
    submission = Submission(kind="serve", command=(), nodes=1, gpus_per_node=0)
    folder = JobFolder(Path(tempfile.mkdtemp(dir=site.shared)))
    request = JobRequest(submission=submission, folder=folder, tandem=(), variables=variables, home=site.home)
    config = SlurmSite(cpus_per_node=2)
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(site.shared / MODEL)]
    server += ["--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
    server += ["--host", site.nodes[0].address, "--port", str(PORT), "--api-key", KEY]
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options(config, request))]
    folder.write_environment(exports(config, variables))
    lines += [*preparation(config, [source(folder.environment)]), f"srun --ntasks-per-node=1 {shlex.join(server)}"]
    folder.script.write_text("\n".join([*lines, ""]))
    since = time.monotonic()
    site.slurm.run("sbatch", "--parsable", str(folder.script))
    try:
        return timed(site, lambda: KEY, since)
    except TimeoutError as error:
        raise TimeoutError(f"{error}\n{folder.log.read_text()[-6000:]}") from error
    finally:
        end(site)


def timed(site: Site, key: Any, since: float) -> float:
    """Seconds until the app of the one compute node answers."""
    try:
        return answers_after(f"http://{site.nodes[0].address}:{PORT}/v1", key, since, timeout_s=TIMEOUT_S)
    except TimeoutError as error:
        raise TimeoutError(f"{error}\n{site.output()}") from error


def end(site: Site) -> None:
    """Cancel all jobs, and wait until the node is free."""
    site.slurm.run("scancel", "--user=root")
    deadline = time.monotonic() + 90
    while site.slurm.run("squeue", "--noheader").strip() or "idle" not in site.slurm.run("sinfo", "-h", "-o", "%T"):
        if time.monotonic() > deadline:
            raise TimeoutError("The job did not end within 90 s of its cancellation.")
        time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(exit_status(main))
