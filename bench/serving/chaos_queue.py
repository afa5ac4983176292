"""A batch whose parts are killed on the way: gateways, dispatcher, engines, the database, and a disk that is full for a while.

    python -m bench.serving.chaos_queue [--items 10000] [--every 6] [--seed 0] [--json FILE] [--check] [--smoke]

An app with two gateways and two echo engines (they give the prompt's words back) has its state in PostgreSQL and its home on a
file system of its own. A batch is sent by the `openai` SDK; every few seconds something is harmed, until the batch has ended.
Then each request must have one answer, the right one.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.harness import report
from bench.harness.machine import machine
from bench.harness.options import options_parser
from bench.harness.postgresql import Server, postgresql
from bench.harness.report import Verdict
from bench.serving.chaos_app import title

FAULTS = ("gateway killed", "dispatcher killed", "engine killed", "database restarted", "disk full")
GATEWAYS, REPLICAS = 2, 2
WORDS, DELAY_S = 4, 0.02
"""Words of a prompt, and seconds for each word of an answer."""
AWAY_S = 3.0
"""Seconds for which the database is away, and the disk full."""
HOME_MIB = 512
MOST_COMPUTED = 2
"""Times that a request may be answered by an engine, at most."""
DISPLACED = 2048
"""Places by which 99 of 100 requests may end before or after their turn."""
LIMIT_S = 1800.0
COLUMNS = (
    "requests",
    "faults",
    "lost",
    "answered twice",
    "wrong",
    "computed twice",
    "at most",
    "out of order",
    "seconds",
)


def main() -> int:
    """Measure; 1 if a bar is missed and --check is given."""
    parser = options_parser(__doc__, smoke="500 requests, a fault of each kind")
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--every", type=float, default=6.0, help="seconds between two faults")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.smoke:
        options.items, options.every = 500, 3.0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    figures = measure(options)
    row = [
        f"{options.items:,}",
        ", ".join(f"{count} x {kind}" for kind, count in sorted(figures["faults"].items())),
        *(str(figures[key]) for key in ("lost", "twice", "wrong", "recomputed", "most_computed", "displaced")),
        f"{figures['seconds']:.0f}",
    ]
    bars = (("lost", 0), ("twice", 0), ("wrong", 0), ("most_computed", MOST_COMPUTED), ("displaced", DISPLACED))
    verdicts = [
        Verdict(figures[key] <= bar, 1.0 if figures[key] <= bar else 0.0, f"{key}: {figures[key]} (bar {bar})")
        for key, bar in bars
    ]
    report.show("A batch under faults", COLUMNS, [row], names=0, width=160)
    page_header = "# A batch under faults\n\nMade by `python -m bench.serving.chaos_queue --json ...`."
    page = f"{page_header}\n\n{report.markdown_table(COLUMNS, [row])}\n\n{report.verdict_lines(verdicts)}\n"
    report.write(options.json, {"machine": machine(), **figures}, page)
    return report.judge(verdicts, check=options.check)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the batch under faults, and compare its output with its input."""
    dice = random.Random(options.seed)
    with contextlib.ExitStack() as exit_stack:
        database = exit_stack.enter_context(postgresql())
        home = exit_stack.enter_context(own_file_system())
        cluster, url = exit_stack.enter_context(serving(home, database.create("tandem")))
        client = client_of(url)
        content = "".join(json.dumps(request(number)) + "\n" for number in range(options.items)).encode()
        file = client.files.create(file=("requests.jsonl", content), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        began, faults = time.monotonic(), collections.Counter[str]()
        status = ""
        order: list[str] = []
        while status != "completed":
            if status in ("failed", "expired", "cancelled") or time.monotonic() - began > LIMIT_S:
                raise RuntimeError(f"The batch is {status} after {time.monotonic() - began:.0f} s.")
            time.sleep(options.every)
            if not options.smoke or sum(faults.values()) < len(FAULTS):
                order = order or dice.sample(FAULTS, len(FAULTS))
                if harm(kind := order.pop(), cluster, database, home, dice):
                    faults[kind] += 1
                    print(f"{time.monotonic() - began:.0f} s: {kind}", file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):  # it may be the gateway that has just been killed
                status = client.batches.retrieve(batch.id).status
        seconds = time.monotonic() - began
        done = retried(lambda: client.batches.retrieve(batch.id))
        lines = retried(lambda: client.files.content(done.output_file_id).text).splitlines()
        return {"faults": dict(faults), "seconds": seconds, **compare(lines, options.items, home, batch.id)}


def request(number: int) -> dict[str, Any]:
    """One line of the input."""
    prompt = " ".join(f"{number}-{word}" for word in range(WORDS))
    body = {"model": "echo", "prompt": prompt, "max_tokens": WORDS}
    return {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}


def compare(lines: list[str], items: int, home: Path, batch: str) -> dict[str, Any]:
    """Answers beside requests, and the times that each was computed: each answer of an engine is a line of a segment."""
    from tandem.jobs.work.queue import ItemQueue

    answers = [json.loads(line) for line in lines]
    seen = collections.Counter(answer["custom_id"] for answer in answers)
    wrong = sum(
        answer["response"]["body"]["choices"][0]["text"].split()
        != request(int(answer["custom_id"][1:]))["body"]["prompt"].split()
        for answer in answers
    )
    computed: collections.Counter[str] = collections.Counter()
    for segment in (home / "jobs" / batch / "answers").glob("*.jsonl"):
        computed.update(
            json.loads(line)["custom_id"] for line in segment.read_text().splitlines() if line.endswith("}")
        )
    queue, ended, after = ItemQueue.open(), [], -1
    while page := queue.items(batch, after=after):
        ended += page
        after = page[-1].position or 0
    turns = sorted(range(len(ended)), key=lambda n: (ended[n].ended_at is None, ended[n].ended_at, n))
    displaced = [abs(turn - position) for turn, position in enumerate(turns)]
    return {
        "lost": items - len(seen),
        "twice": sum(count > 1 for count in seen.values()),
        "wrong": wrong,
        "recomputed": sum(count > 1 for count in computed.values()),
        "most_computed": max(computed.values(), default=0),
        "displaced": round(statistics.quantiles(displaced, n=100)[98]) if len(displaced) > 1 else 0,
    }


def harm(kind: str, cluster: Any, database: Server, home: Path, dice: random.Random) -> bool:
    """Do one harm; False where there is nothing to harm now."""
    from tandem.cluster.marks import marked_processes

    if kind == "database restarted":
        database.stop()
        time.sleep(AWAY_S)
        database.start()
        return True
    if kind == "disk full":
        filler = home / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(b"\0" * 2**20)
                file.flush()
        time.sleep(AWAY_S)
        filler.unlink()
        return True
    name = {"gateway killed": "Gateway", "dispatcher killed": "Directory", "engine killed": "engine"}[kind]
    processes = [p for p in marked_processes(cluster.mark) if title(p).startswith(f"ray::ServeReplica:tandem:{name}")]
    if not processes:
        return False
    dice.choice(processes).kill()
    return True


@contextlib.contextmanager
def own_file_system() -> Iterator[Path]:
    """A folder that can be filled without harm to this machine: a file system in memory, for root; else a folder."""
    with tempfile.TemporaryDirectory(prefix="tq-", dir="/tmp") as folder:
        home = Path(folder)
        if os.geteuid() != 0:
            raise SystemExit("This benchmark mounts a file system of its own, which root alone may do.")
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={HOME_MIB}m,mode=700", "tmpfs", str(home)], check=True)
        try:
            yield home
        finally:
            subprocess.run(["umount", "--lazy", str(home)], check=True)


@contextlib.contextmanager
def serving(home: Path, database_url: str) -> Iterator[tuple[Any, str]]:
    """The app: its cluster, and its address."""
    from tandem import settings

    variables = {"TANDEM_HOME": str(home), "TANDEM_DATABASE_URL": database_url, "OMP_NUM_THREADS": "1"}
    settings.export(variables, override=True)
    subprocess.run([sys.executable, "-m", "tandem", "db", "upgrade"], check=True, capture_output=True)
    from tandem.cluster.local import local_cluster
    from tandem.cluster.ports import free_ports

    with local_cluster(num_cpus=4) as cluster:
        import ray
        from ray import serve

        from tandem.apps.build import build_app
        from tandem.config import GatewayConfig, ServeConfig, ServedModelConfig

        ray.init(address=cluster.address, namespace="tandem", log_to_driver=False, logging_level=logging.ERROR)
        port = free_ports(1)[0]
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        model = ServedModelConfig(
            model="echo",
            name="echo",
            engine="echo",
            engine_args={"delay_s": DELAY_S},
            replicas=REPLICAS,
            cpus_per_replica=0.5,
        )
        app = build_app(ServeConfig(models=(model,), gateway=GatewayConfig(replicas=GATEWAYS)), check=False)
        serve.run(app, name="tandem", route_prefix="/")
        try:
            yield cluster, f"http://127.0.0.1:{port}"
        finally:
            ray.shutdown()


def client_of(url: str) -> Any:
    """OpenAI's SDK, which tries again by itself."""
    from openai import OpenAI

    return OpenAI(base_url=f"{url}/v1", api_key="none", timeout=30, max_retries=5)


def retried(call: Any) -> Any:
    """The result of a call that may meet a gateway which has just been killed."""
    for _ in range(20):
        with contextlib.suppress(Exception):
            return call()
        time.sleep(1.0)
    return call()


if __name__ == "__main__":
    sys.exit(main())
