"""Honest streams beside hostile clients: gaps between tokens, failures, ejected replicas, the gateway's memory.

    python -m bench.serving.hostile [--rounds 3] [--seconds 10] [--attack NAME ...] [--json FILE] [--check]

An app with two echo engines of a fixed time for each token is served as `tandem serve up` serves it: HAProxy, gateway, engines.
Eight streams ask one after the other. In alternating rounds they are alone, or beside one attack
(`bench.serving.hostile_attacks`), whose process has a fifth of one core; at last beside all attacks at once. Not here: attacks on
tokenizer, embeddings and adapters of a real engine, which the unit tests carry out one by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import httpx
import psutil
import uvloop

from bench.harness.load import run_queue_s
from bench.harness.machine import machine
from bench.harness.options import options_parser
from bench.harness.report import Rounds, Verdict, judge, markdown_table, show, verdict_lines, write
from bench.harness.servers import ROOT
from bench.serving.hostile_attacks import ATTACKS, MODEL, SHARE

STREAMS, TOKENS, GAP_S = 8, 50, 0.02
REPLICAS = 2
P99_BAR = 1.25
"""99th percentile of the gaps between tokens beside an attack, as a share of that without."""
GROWTH_BAR_MB = 256.0
"""The gateway's growth in a round with an attack: `gateway.max_held_bytes` bounds bodies at so much."""
START_S = 1.5
"""Seconds from the start of the attackers' process to the measurement beside it."""
ALL = "all at once"
COLUMNS = (
    "attack",
    "attempts",
    "answers",
    "p50 ms",
    "p99 ms",
    "of quiet",
    "failed",
    "ejected",
    "gateway MB",
    "gateway core",
)


class App(NamedTuple):
    """The app under test."""

    url: str
    gateway: psutil.Process


@dataclass(slots=True)
class Tally:
    """Measurements of the honest streams."""

    gaps_ms: list[float] = field(default_factory=list)
    answers: int = 0
    failed: list[str] = field(default_factory=list)


class Stream(asyncio.Protocol):
    """One honest connection, which sends one request after the other until the time is over."""

    def __init__(self, request: bytes, until: float, tally: Tally) -> None:
        self._request, self._until, self._tally = request, until, tally
        self._tail = b""
        self._last = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def _send(self) -> None:
        self._tail, self._last = b"", 0.0
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Note the time since the last token; the end of an answer is followed by the next request."""
        if not self._tail and not data.startswith(b"HTTP/1.1 200"):
            self._fail(data[:200].decode(errors="replace"))
            return
        now = time.perf_counter()
        if b"data: {" in data:
            if self._last:
                self._tally.gaps_ms.append(1000 * (now - self._last))
            self._last = now
        self._tail = (self._tail + data)[-64:]
        if self._tail.endswith(b"0\r\n\r\n"):
            if b"[DONE]" not in self._tail:
                self._fail("the stream ended without [DONE]")
                return
            self._tally.answers += 1
            if now < self._until:
                self._send()
            else:
                self._end()

    def connection_lost(self, error: Exception | None) -> None:
        """A connection that ends before its time is a failure."""
        if not self.done.done():
            self._fail(f"connection lost: {error}")

    def _fail(self, reason: str) -> None:
        self._tally.failed.append(reason)
        self._end()

    def _end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)
        self._transport.close()


class Watch(threading.Thread):
    """Follows the gateway's memory, and the number of replicas that it uses, during a round."""

    def __init__(self, running: App) -> None:
        super().__init__(daemon=True)
        self._running = running
        self._over = threading.Event()
        self.most_mb = running.gateway.memory_info().rss / 2**20
        self.min_ready = REPLICAS

    def run(self) -> None:
        """Look four times a second."""
        with httpx.Client(base_url=self._running.url, timeout=10.0) as http:
            while not self._over.wait(0.25):
                self.most_mb = max(self.most_mb, self._running.gateway.memory_info().rss / 2**20)
                with contextlib.suppress(httpx.HTTPError, KeyError, ValueError):
                    self.min_ready = min(self.min_ready, http.get("/health").json()["ready_replicas"][MODEL])

    def end(self) -> None:
        """Stop."""
        self._over.set()
        self.join()


def main() -> int:
    """Measure; 1 if a bar is missed and --check is given."""
    parser = options_parser(__doc__, smoke="one round of 2 s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="length of each half of a round; all at once: six times"
    )
    parser.add_argument("--attack", action="append", choices=[*ATTACKS, ALL], help="this one only; may be repeated")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.seconds = 1, 2.0
    rounds = Rounds(options.json)
    with app() as running:
        for name in options.attack or [*ATTACKS, ALL]:
            seconds = options.seconds * (6 if name == ALL and not options.smoke else 1)
            rounds.append(measure(running, name, options.rounds, seconds))
    rows = [cells(row) for row in rounds]
    title = f"{STREAMS} streams, {1000 * GAP_S:.0f} ms a token; attackers have {SHARE:g} of a core"
    show(title, COLUMNS, rows, width=150)
    verdicts = [verdict for row in rounds for verdict in judge_attack(row)]
    command = f"python -m bench.serving.hostile --rounds {options.rounds} --seconds {options.seconds:g}"
    page = f"# Hostile clients\n\nMade by `{command}`. {title}."
    write(
        options.json,
        {"machine": machine(), "rounds": rounds},
        f"{page}\n\n{markdown_table(COLUMNS, rows)}\n\n{verdict_lines(verdicts)}\n",
    )
    return judge(verdicts, check=options.check)


def measure(running: App, name: str, rounds: int, seconds: float) -> dict[str, Any]:
    """One attack: quiet and attacked rounds in turns."""
    uvloop.run(drive_honest_clients(running, 1.0))
    halves = [(measure_half(running, None, seconds), measure_half(running, name, seconds)) for _ in range(rounds)]
    return {"attack": name, "quiet": [quiet for quiet, _ in halves], "attacked": [attacked for _, attacked in halves]}


def measure_half(running: App, name: str | None, seconds: float) -> dict[str, Any]:
    """Half a round: the honest streams, alone or beside an attack."""
    watch = Watch(running)
    before_mb, before_s, start_time = watch.most_mb, cpu_s(running.gateway), time.monotonic()
    watch.start()
    attackers = None
    if name is not None:
        names = [*ATTACKS] if name == ALL else [name]
        duration_s = seconds + START_S
        command = [sys.executable, "-m", "bench.serving.hostile_attacks", running.url, str(duration_s), *names]
        attackers = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        # Its start takes a whole core.
        time.sleep(START_S)
    figures = uvloop.run(drive_honest_clients(running, seconds))
    watch.end()
    figures["gateway_core"] = (cpu_s(running.gateway) - before_s) / (time.monotonic() - start_time)
    if attackers is not None:
        figures["attackers"] = json.loads(attackers.communicate(timeout=120)[0])
        time.sleep(1.0)
    return {
        **figures,
        "gateway_mb": watch.most_mb,
        "growth_mb": watch.most_mb - before_mb,
        "ejected": REPLICAS - watch.min_ready,
    }


async def drive_honest_clients(running: App, seconds: float) -> dict[str, Any]:
    """Gaps between tokens of STREAMS streams."""
    parts = urlsplit(running.url)
    body = json.dumps({"model": MODEL, "prompt": "word " * TOKENS, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    tally, loop, until = Tally(), asyncio.get_running_loop(), time.perf_counter() + seconds
    waited = run_queue_s()
    streams = [
        (
            await loop.create_connection(
                lambda: Stream(request, until, tally), str(parts.hostname), int(parts.port or 80)
            )
        )[1]
        for _ in range(STREAMS)
    ]
    _, pending = await asyncio.wait([stream.done for stream in streams], timeout=seconds + 30.0)
    gaps = sorted(tally.gaps_ms) or [float("inf")]
    return {
        "answers": tally.answers,
        "failed": len(tally.failed) + len(pending),
        "failures": tally.failed[:3],
        "p50_ms": statistics.median(gaps),
        "p99_ms": gaps[int(0.99 * (len(gaps) - 1))],
        "generator_waited": (run_queue_s() - waited) / seconds,
    }


@contextlib.contextmanager
def app() -> Iterator[App]:
    """Two echo replicas, served as `tandem serve up` serves them."""
    from tandem import settings
    from tandem.cluster.local import local_cluster
    from tandem.cluster.marks import marked_processes
    from tandem.cluster.ports import free_ports

    with tempfile.TemporaryDirectory() as folder:
        settings.export({"TANDEM_HOME": folder}, override=True)
        with local_cluster(num_cpus=8) as cluster, contextlib.ExitStack() as exit_stack:
            import ray
            from ray import serve

            from tandem.apps.build import build_app
            from tandem.config import ServeConfig, ServedModelConfig

            (port,) = free_ports(1)
            model = ServedModelConfig(
                model=MODEL,
                name=MODEL,
                engine="echo",
                replicas=REPLICAS,
                max_adapters=0,
                cpus_per_replica=0.5,
                engine_args={"delay_s": GAP_S, "max_length": 10_000},
                requests_per_replica=256,
            )
            ray.init(address=cluster.address, namespace="tandem", log_to_driver=False, logging_level=logging.ERROR)
            exit_stack.callback(ray.shutdown)
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
            serve.run(build_app(ServeConfig(models=(model,)), check=False), name="tandem", route_prefix="/")
            (gateway,) = (process for process in marked_processes(cluster.mark) if "Gateway" in process_title(process))
            yield App(f"http://127.0.0.1:{port}", gateway)


def cpu_s(process: psutil.Process) -> float:
    """Seconds of a core that a process has had."""
    times = process.cpu_times()
    return float(times.user + times.system)


def process_title(process: psutil.Process) -> str:
    """The title of a process."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def ratio(row: dict[str, Any], key: str = "p99_ms") -> float:
    """A figure beside the attack as a share of the quiet one: the median of the rounds."""
    pairs = zip(row["quiet"], row["attacked"], strict=True)
    return statistics.median(attacked[key] / quiet[key] for quiet, attacked in pairs)


def judge_attack(row: dict[str, Any]) -> list[Verdict]:
    """One attack against the bars."""
    name, attacked = row["attack"], row["attacked"]
    failed = sum(result["failed"] for result in (*row["quiet"], *attacked))
    ejected, growth = (max(result[key] for result in attacked) for key in ("ejected", "growth_mb"))
    return [
        Verdict(ratio(row) <= P99_BAR, P99_BAR / ratio(row), f"{name}: p99 {ratio(row):.2f} of quiet (bar {P99_BAR})"),
        Verdict(not failed, float(not failed), f"{name}: {failed} honest streams failed (bar 0)"),
        Verdict(not ejected, float(not ejected), f"{name}: {ejected} replicas ejected (bar 0)"),
        Verdict(
            growth <= GROWTH_BAR_MB,
            GROWTH_BAR_MB / max(growth, 1.0),
            f"{name}: the gateway grew by {growth:.0f} MB (bar {GROWTH_BAR_MB:.0f})",
        ),
    ]


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text: medians of the rounds, quiet and attacked."""
    quiet, attacked = row["quiet"], row["attacked"]
    attackers = [result["attackers"] for result in attacked]
    statuses: Counter[str] = sum((Counter(result["statuses"]) for result in attackers), Counter())

    def quiet_and_attacked(key: str) -> str:
        return " -> ".join(f"{statistics.median(result[key] for result in phase):.1f}" for phase in (quiet, attacked))

    return [
        row["attack"],
        f"{sum(result['attempts'] for result in attackers) / len(attacked):,.0f} a round",
        ", ".join(f"{status}: {count}" for status, count in statuses.most_common(4)),
        quiet_and_attacked("p50_ms"),
        quiet_and_attacked("p99_ms"),
        f"{ratio(row):.2f}",
        str(sum(result["failed"] for result in (*quiet, *attacked))),
        str(max(result["ejected"] for result in attacked)),
        f"{max(result['gateway_mb'] for result in attacked):.0f} (+{max(result['growth_mb'] for result in attacked):.0f})",
        " -> ".join(
            f"{statistics.median(result['gateway_core'] for result in phase):.2f}" for phase in (quiet, attacked)
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
