"""Goodput at twice the capacity; clients that disconnect; idle connections; clients that do not read.

    python -m bench.serving.overload [--engine vllm|echo] [--rounds 3] [--json FILE] [--check]

One replica behind HAProxy and a gateway. First as many requests as may be in flight show how many the replica answers in a
second; then requests come at that rate and at twice it, in turns, whether or not they are answered, each with a `timeout` of some
times what an answer took before. Goodput are the answers that came in time, and their tokens. 2 x capacity is held against 1 x.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import uvloop

from bench.harness.machine import machine
from bench.harness.models import write_model
from bench.harness.open_loop import Client, closed_loop, open_loop
from bench.harness.options import options_parser
from bench.harness.report import Rounds, Verdict, judge, markdown_table, show, verdict_lines, write

GOODPUT_BAR = 0.9
LEAVE_BAR_S = 1.0
IDLE = 512
IDLE_BAR = 1.1
"""Latency with idle connections, as a share of that without."""
AT_ONCE = 32
"""Requests that the engine generates at once."""
PATIENCE = 8.0
"""A request's `timeout`, as a multiple of the latency at a full engine."""
UNREAD = (
    "{clients} clients that do not read, streams of {answer_mb} MB each: the gateway grows by {gateway_mb:.0f} MB, the proxy by "
    "{proxy_mb:.0f} MB."
)
COLUMNS = (
    "round",
    "asked/s",
    "in time/s",
    "tokens/s",
    "of capacity",
    "429",
    "504",
    "late",
    "p50 s",
    "p99 s",
    "Retry-After s",
)


class App(NamedTuple):
    """The app under test."""

    url: str
    load: Callable[[], int]
    """Requests in the engine now, by its own account."""
    memory_mb: Callable[[], dict[str, float]]
    """Resident memory of gateway and proxy."""


def main() -> int:
    """Measure; 1 if a bar is missed and --check is given."""
    parser = options_parser(__doc__, smoke="one round of 8 s")
    parser.add_argument("--engine", choices=("vllm", "echo"), default="vllm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of one measurement")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.seconds = 1, 8.0
    with app(options.engine) as running:
        capacity, rounds = uvloop.run(loads(running, options.rounds, options.seconds, options.json))
        disconnects = {
            way: [time_disconnects(running, way) for _ in range(options.rounds)]
            for way in ("stream", "whole", "waiting")
        }
        idle = uvloop.run(measure_idle_connections(running, options.rounds, options.seconds / 4))
        unread = measure_unread_streams(running)
    rows = [cells(row, capacity) for row in rounds]
    verdicts = [
        *goodput(rounds),
        *(disconnect_verdict(way, max(times)) for way, times in disconnects.items()),
        idle_verdict(idle),
    ]
    failed = {status: count for row in rounds for status, count in row["failed"].items()}
    if failed:
        verdicts.append(Verdict(False, 0.0, f"other answers than 200, 429 and 504: {failed}"))
    title = (
        f"{options.engine}: {capacity['requests_per_s']:.1f} requests/s at capacity, {capacity['latency_s']:.2f} s each"
    )
    show(title, COLUMNS, rows, width=140)
    unread_text = UNREAD.format(**unread)
    print(unread_text)
    page_header = (
        f"# Too much\n\nMade by `python -m bench.serving.overload --engine {options.engine} --json ...`. {title}."
    )
    page = f"{page_header}\n\n{markdown_table(COLUMNS, rows)}\n\n{verdict_lines(verdicts)}\n\n{unread_text}\n"
    figures = {"capacity": capacity, "rounds": rounds, "leave_s": disconnects, "idle": idle, "unread": unread}
    write(options.json, {"machine": machine(), **figures}, page)
    return judge(verdicts, check=options.check)


def goodput(rounds: list[dict[str, Any]]) -> list[Verdict]:
    """Twice the capacity against once, each round its own; in tokens too, for short answers alone would be cheap."""
    results = []
    for key, label in (("goodput_per_s", "answers"), ("good_tokens_per_s", "tokens")):
        pairs = zip(rounds[::2], rounds[1::2], strict=True)
        share = statistics.median(overloaded[key] / at_capacity[key] for at_capacity, overloaded in pairs)
        message = f"goodput at 2 x capacity, {label}: {share:.2f} of that at capacity (bar {GOODPUT_BAR})"
        results.append(Verdict(share >= GOODPUT_BAR, share / GOODPUT_BAR, message))
    return results


def disconnect_verdict(way: str, longest_s: float) -> Verdict:
    """Verdict on the time that an engine generates for a disconnected client."""
    consequence = f"the engine has no request {1000 * longest_s:.0f} ms later (bar {1000 * LEAVE_BAR_S:.0f})"
    return Verdict(longest_s <= LEAVE_BAR_S, LEAVE_BAR_S / longest_s, f"a client leaves ({way}): {consequence}")


def idle_verdict(idle: dict[str, Any]) -> Verdict:
    """Verdict on the cost of idle connections."""
    message = f"{IDLE} idle connections: latency {idle['share']:.2f} of that without (bar {IDLE_BAR})"
    cost = f"{message}, {idle['memory_mb']:.0f} MB of memory"
    return Verdict(idle["share"] <= IDLE_BAR, IDLE_BAR / idle["share"], cost)


@contextlib.contextmanager
def app(engine: str) -> Iterator[App]:
    """One replica, served as `tandem serve up` serves it."""
    from tandem import settings
    from tandem.cluster.local import local_cluster
    from tandem.cluster.marks import marked_processes
    from tandem.cluster.ports import free_ports

    with tempfile.TemporaryDirectory() as folder:
        settings.export({"TANDEM_HOME": folder}, override=True)
        write_model(Path(folder) / "model")
        with local_cluster(num_cpus=8) as cluster:
            import ray
            from ray import serve

            from tandem.apps.build import build_app
            from tandem.config import ServeConfig, ServedModelConfig

            (port,) = free_ports(1)
            args: dict[str, Any] = (
                {"max_num_seqs": AT_ONCE, "max_model_len": 1024} if engine == "vllm" else {"delay_s": 0.02}
            )
            model = ServedModelConfig(
                model=str(Path(folder) / "model"),
                name="bench",
                engine=engine,
                max_adapters=0,
                engine_args=args,
                requests_per_replica=None if engine == "vllm" else AT_ONCE,
            )
            # It writes as fast as it is read.
            pour = ServedModelConfig(model="pour", name="pour", engine="echo", max_adapters=0, cpus_per_replica=0.1)
            ray.init(address=cluster.address, namespace="tandem", log_to_driver=False, logging_level=logging.ERROR)
            with contextlib.ExitStack() as exit_stack:
                exit_stack.callback(ray.shutdown)
                serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
                serve.run(build_app(ServeConfig(models=(model, pour)), check=False), name="tandem", route_prefix="/")
                replica = serve.get_deployment_handle("engine-bench", "tandem")

                def load() -> int:
                    record = replica.record.remote().result(timeout_s=30)
                    return int(record.running + record.waiting)

                def memory_mb() -> dict[str, float]:
                    return {
                        word: sum(p.memory_info().rss for p in marked_processes(cluster.mark) if word in title(p))
                        / 2**20
                        for word in ("Gateway", "haproxy")
                    }

                yield App(f"http://127.0.0.1:{port}", load, memory_mb)


def title(process: psutil.Process) -> str:
    """The title of a process."""
    try:
        return " ".join([process.name(), *process.cmdline()])
    except psutil.Error:
        return ""


async def loads(
    running: App, rounds: int, seconds: float, path: Path | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The capacity, and then once and twice as much in turns."""
    client = Client(running.url, "bench", "import os\n\ndef main(path):")
    await closed_loop(client, 8, 3.0)
    capacity = await closed_loop(client, AT_ONCE + AT_ONCE // 4, seconds)
    timeout_s = PATIENCE * capacity["latency_s"]
    results = Rounds(path)
    for number in range(rounds):
        for factor in (1.0, 2.0):
            row = await open_loop(client, factor * capacity["requests_per_s"], seconds, timeout_s, seed=number)
            results.append({"round": number, "factor": factor, "timeout_s": timeout_s, **row})
            await asyncio.sleep(timeout_s)
    client.close()
    return capacity, results


def time_disconnects(running: App, way: str) -> float:
    """Seconds from a client's leaving until its engine has no request left; `waiting`: one that was still in the queue."""
    until(lambda: running.load() == 0)
    body = {"model": "bench", "prompt": "import os", "max_tokens": 900, "ignore_eos": True}
    connections = []
    if way == "waiting":
        connections = [raw_request(running.url, body) for _ in range(AT_ONCE + AT_ONCE // 4)]
        until(lambda: running.load() >= AT_ONCE)
    sock = raw_request(running.url, body | {"stream": way == "stream"})
    if way == "waiting":
        time.sleep(0.3)
        sock.close()
        for connection in connections:
            connection.close()
    else:
        until(lambda: running.load() == 1)
        sock.close()
    start_time = time.perf_counter()
    until(lambda: running.load() == 0)
    return time.perf_counter() - start_time


async def measure_idle_connections(running: App, rounds: int, seconds: float) -> dict[str, Any]:
    """Latency of 8 streams without and with idle connections, in turns."""
    client = Client(running.url, "bench", "import os")
    shares, growth = [], []
    for _ in range(max(2, rounds)):
        baseline = await closed_loop(client, 8, seconds)
        memory_before_mb = running.memory_mb()
        idle = [raw_request(running.url, None) for _ in range(IDLE)]
        for sock in idle:
            sock.recv(65536)
        with_them = await closed_loop(client, 8, seconds)
        growth.append(sum(running.memory_mb().values()) - sum(memory_before_mb.values()))
        for sock in idle:
            sock.close()
        shares.append(with_them["latency_s"] / baseline["latency_s"])
    client.close()
    return {"share": statistics.median(shares), "shares": shares, "memory_mb": max(growth)}


def measure_unread_streams(running: App, clients: int = 16, answer_mb: int = 48) -> dict[str, Any]:
    """Memory growth of gateway and proxy when large streams are not read."""
    body = {"model": "pour", "prompt": "x" * 4096, "stream": True, "ignore_eos": True, "max_tokens": answer_mb * 256}
    memory_before_mb = running.memory_mb()
    socks = [raw_request(running.url, body) for _ in range(clients)]
    time.sleep(10.0)
    memory_after_mb = running.memory_mb()
    for sock in socks:
        sock.close()
    grown = {
        "gateway_mb": memory_after_mb["Gateway"] - memory_before_mb["Gateway"],
        "proxy_mb": memory_after_mb["haproxy"] - memory_before_mb["haproxy"],
    }
    return {"clients": clients, "answer_mb": answer_mb, **grown}


def raw_request(url: str, body: dict[str, Any] | None) -> socket.socket:
    """A request on a connection of its own; without a body one for the list of models."""
    host, port = url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)))
    if body is None:
        sock.sendall(b"GET /v1/models HTTP/1.1\r\nHost: bench\r\n\r\n")
    else:
        raw = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    return sock


def until(happened: Callable[[], bool], within_s: float = 60.0) -> None:
    """Wait for something that must come."""
    deadline = time.monotonic() + within_s
    while not happened():
        if time.monotonic() > deadline:
            raise RuntimeError(f"it did not come within {within_s:.0f} s")


def cells(row: dict[str, Any], capacity: dict[str, Any]) -> list[str]:
    """A row as text."""
    return [
        f"{row['round']}, {row['factor']:g} x",
        f"{row['offered_per_s']:.1f}",
        f"{row['goodput_per_s']:.1f}",
        f"{row['good_tokens_per_s']:,.0f}",
        f"{row['good_tokens_per_s'] / capacity['tokens_per_s']:.2f}",
        str(row["refused_429"]),
        str(row["expired_504"]),
        str(row["late"]),
        f"{row['p50_s']:.2f}",
        f"{row['p99_s']:.2f}",
        "" if row["retry_after_s"] is None else f"{row['retry_after_s']:g}",
    ]


if __name__ == "__main__":
    sys.exit(main())
