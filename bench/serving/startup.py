"""Start-up time until a model answers: a bare vLLM server, a replica of Tandem, and the whole app by `serve run`.

    python -m bench.serving.startup [--rounds 3] [--json FILE] [--check]

Each start has the machine for itself, the order turns from round to round. Ray runs already when `serve run` is started,
as on a cluster; the time from nothing (`tandem serve up`, which starts Ray too) is shown beside it, without a bar. All of them
find what an earlier start has compiled; the replica's start before, which found nothing, is told apart.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from bench.harness import report
from bench.harness.machine import machine
from bench.harness.models import write_model
from bench.harness.options import options_parser
from bench.harness.report import Verdict
from bench.harness.servers import ENVIRONMENT, MARK, ROOT, free_port, members

REPLICA_BAR, APP_BAR = 1.1, 1.3
ARGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024")
CONFIG = """
models:
  - model: {folder}
    name: bench
    max_adapters: 0
    engine_args: {{max_model_len: 1024}}
"""
LOADED = re.compile(r"Model loading took .*?([\d.]+) seconds")
WARMED = re.compile(r"init engine .*?took ([\d.]+) s")
COLUMNS = ("start", "seconds", "of bare", "process", "imports", "engine", "first answer after")


def main() -> int:
    """Measure; 1 if a bar is missed and --check is given."""
    parser = options_parser(__doc__, smoke="one round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.smoke:
        options.rounds = 1
    results = report.Rounds(options.json)
    with tempfile.TemporaryDirectory(prefix="tb-", dir="/tmp") as name:
        folder = Path(name)
        write_model(folder / "model")
        (folder / "app.yaml").write_text(CONFIG.format(folder=folder / "model"))
        # Bare vLLM compiles its sampler when it is first asked for, a replica of Tandem before it is ready.
        for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT"):
            os.environ[variable] = str(folder / "compiled" / variable.lower())
        cold = app(folder)
        starts: list[Callable[[Path], dict[str, Any]]] = [bare, app, from_nothing]
        for number in range(options.rounds):
            for start in starts[number % 3 :] + starts[: number % 3]:
                results.append({"round": number, "start": start.__name__, **start(folder)})
                print(json.dumps(results[-1]), file=sys.stderr)
    summary = summarise(results)
    rows = [cells(row) for row in summary]
    verdicts = [
        share_verdict("a replica is ready", summary[1]["replica_of_bare"], REPLICA_BAR),
        share_verdict("`serve run` answers", summary[1]["of_bare"], APP_BAR),
    ]
    report.show("From the start to an answer, medians", COLUMNS, rows)
    page_header = "# Start-up\n\nMade by `python -m bench.serving.startup --json ...`."
    message = f"A replica that finds nothing compiled is ready after {cold['replica']:.1f} s."
    print(message)
    page = f"{page_header}\n\n{report.markdown_table(COLUMNS, rows)}\n\n{message}\n\n{report.verdict_lines(verdicts)}\n"
    report.write(options.json, {"machine": machine(), "cold": cold, "summary": summary, "rounds": results}, page)
    return report.judge(verdicts, check=options.check)


def bare(folder: Path) -> dict[str, Any]:
    """vLLM's server as it comes; its log has the seconds of loading and warm-up."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model"), *ARGS]
    command += ["--served-model-name", "bench", "--host", "127.0.0.1", "--port", str(port)]
    # As it comes it forks its engine; Tandem's log level costs a line or two.
    env = {k: v for k, v in ENVIRONMENT.items() if k not in ("VLLM_WORKER_MULTIPROC_METHOD", "VLLM_LOGGING_LEVEL")}
    log = folder / "bare.log"
    with running_process("bare", command, env, log) as since:
        ready = answers(port, since)
    log_text = log.read_text()
    seconds = {
        key: float(m.group(1)) for key, rule in (("load", LOADED), ("warm_up", WARMED)) if (m := rule.search(log_text))
    }
    return {"seconds": ready, **seconds}


def app(folder: Path) -> dict[str, Any]:
    """`serve run` on a Ray that is there."""
    from tandem.cluster.local import local_cluster

    port = free_port()
    os.environ["TANDEM_HOME"] = str(folder / "home")
    with local_cluster(num_cpus=8) as cluster:
        env = {"RAY_ADDRESS": str(cluster.address), "TANDEM_HOME": str(folder / "home"), **ENVIRONMENT}
        command = [sys.executable, "-c", SERVE_RUN, str(folder / "app.yaml"), str(port)]
        start_time = time.time()
        with running_process("app", command, env, folder / "app.log") as since:
            ready = answers(port, since)
            at, phases = replica_phases(str(cluster.address), env)
            # Ray may have started the process before anybody asked for a replica.
            phases["process"] = min(phases["process"], at - start_time)
    return {"seconds": ready, "phases": phases, "replica": sum(phases.values())}


def from_nothing(folder: Path) -> dict[str, Any]:
    """`tandem serve up`: Ray, Serve, the replica."""
    port = free_port()
    command = [sys.executable, "-m", "tandem", "serve", "up", "--config", str(folder / "app.yaml"), "--port", str(port)]
    env = {"TANDEM_HOME": str(folder / "home-up"), **ENVIRONMENT}
    with running_process("up", command, env, folder / "up.log") as since:
        return {"seconds": answers(port, since)}


SERVE_RUN = """
import sys
from ray.serve.scripts import cli
import ray
from ray import serve
serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
cli(["run", "serve_apps.openai:app", f"config={sys.argv[1]}"])
"""
"""`serve run`, on a port of our own."""

PHASES = """
import json, sys, ray
from ray import serve
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False, namespace="serve")
snapshot = serve.get_deployment_handle("Directory", "default").watch.remote(0).result(timeout_s=30)
replica = snapshot.replicas[0]
print(json.dumps([replica.started_at, dict(replica.startup_s)]))
"""


def replica_phases(address: str, env: dict[str, str]) -> tuple[float, dict[str, float]]:
    """The replica's record of its start: the time, and the seconds of each phase."""
    done = subprocess.run(
        [sys.executable, "-c", PHASES, address], env={**os.environ, **env}, capture_output=True, text=True, check=True
    )
    at, phases = json.loads(done.stdout.strip().rpartition("\n")[2])
    return at, phases


@contextlib.contextmanager
def running_process(mark: str, command: list[str], env: dict[str, str], log: Path) -> Iterator[float]:
    """A command for the length of a block; yields when it began, and ends it with all it started."""
    since = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env={**os.environ, **env, MARK: mark}, stdout=file, stderr=file, stdin=subprocess.DEVNULL, cwd=ROOT
        )
    try:
        yield since
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        for member in members(mark):
            member.kill()


def answers(port: int, since: float) -> float:
    """Seconds until a completion is answered."""
    body = {"model": "bench", "prompt": "import os", "max_tokens": 1}
    while time.monotonic() - since < 240:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=30).status_code == 200:
                return time.monotonic() - since
        time.sleep(0.05)
    raise TimeoutError("No answer within 240 s.")


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians; a ratio is the median of each round's own."""
    rows = []
    bare_s = {r["round"]: r["seconds"] for r in results if r["start"] == "bare"}
    for start in ("bare", "app", "from_nothing"):
        matching = [r for r in results if r["start"] == start]
        row: dict[str, Any] = {"start": start, "seconds": statistics.median(r["seconds"] for r in matching)}
        row["of_bare"] = statistics.median(r["seconds"] / bare_s[r["round"]] for r in matching)
        if start == "app":
            row["replica_of_bare"] = statistics.median(r["replica"] / bare_s[r["round"]] for r in matching)
            row["phases"] = {k: statistics.median(r["phases"][k] for r in matching) for k in matching[0]["phases"]}
            row["replica"] = statistics.median(r["replica"] for r in matching)
        if start == "bare":
            row["told"] = {
                k: statistics.median(r[k] for r in matching) for k in ("load", "warm_up") if k in matching[0]
            }
        rows.append(row)
    return rows


def share_verdict(label: str, share: float, bar: float) -> Verdict:
    """A time against its bar."""
    return Verdict(share <= bar, bar / share, f"{label} after {share:.2f} of bare vLLM's time (bar {bar})")


NAMES = {"bare": "vLLM server, bare", "app": "serve run, Ray is up", "from_nothing": "tandem serve up, from nothing"}


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text."""
    phases = row.get("phases", {})
    return [
        NAMES[row["start"]],
        f"{row['seconds']:.1f}",
        f"{row['of_bare']:.2f}",
        *(f"{phases[k]:.1f}" if k in phases else "" for k in ("process", "imports", "engine")),
        f"replica {row['replica']:.1f} ({row['replica_of_bare']:.2f})" if "replica" in row else "",
    ]


if __name__ == "__main__":
    sys.exit(main())
