"""Latency that the gateway adds to a request: by its header `server-timing`, and measured from outside.

    python -m bench.serving.gateway_latency [--concurrency 64] [--rounds 3] [--json FILE] [--check]

An app with an echo engine is served as `tandem serve up` serves it: HAProxy, gateway, engine. `--concurrency` streams are open at
any time, each of 32 tokens 50 ms apart, first straight to the engine and then through the app, in turns. Nothing of the
engine's own work is in the figures: an echo has none. Requests have an API key with limits; usage and access log are written.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import uvloop

from bench.harness.keys import make_key
from bench.harness.load import run_queue_s
from bench.harness.options import options_parser
from bench.harness.report import Rounds, Verdict, judge, markdown_table, show, verdict_lines, write

BARS_MS = {"p50": 0.5, "p99": 2.0}
"""At 64 concurrent requests with keys, limits, usage and access log, for the time by the gateway's header."""
TOKENS, GAP_S = 32, 0.05
TIMING = re.compile(rb"server-timing: gateway;dur=([0-9.]+)", re.IGNORECASE)


class Server(NamedTuple):
    """Address of the server under test."""

    url: str
    model: str
    token: str = ""
    """Token of the replica, for direct requests."""
    key: str = ""
    """API key, for requests to the app."""


@dataclass(slots=True)
class Tally:
    """Measurements, in milliseconds."""

    first: list[float] = field(default_factory=list)
    """From a request to the first byte of its answer."""
    added: list[float] = field(default_factory=list)
    """Added latency by the gateway's header."""
    failed: list[str] = field(default_factory=list)


class Asker(asyncio.Protocol):
    """One connection that sends one request after the other until the time is over."""

    def __init__(self, request: bytes, until: float, tally: Tally) -> None:
        self._request, self._until, self._tally = request, until, tally
        self._head = b""
        self._tail = b""
        self._sent_at = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin somewhere within an answer's length, so that requests do not come all at once."""
        self._transport = cast(asyncio.Transport, transport)
        asyncio.get_running_loop().call_later(random.random() * TOKENS * GAP_S, self._send)

    def _send(self) -> None:
        self._head = self._tail = b""
        self._sent_at = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Note the head; the last chunk of an answer is followed by the next request."""
        if not self._tail:
            if not self._head:
                self._tally.first.append(1000 * (time.perf_counter() - self._sent_at))
            self._head += data
            head, separator, self._tail = self._head.partition(b"\r\n\r\n")
            if not separator:
                return
            if not head.startswith(b"HTTP/1.1 200"):
                self._tally.failed.append(self._head[:300].decode(errors="replace"))
                self._end()
                return
            if match := TIMING.search(head):
                self._tally.added.append(float(match.group(1)))
            self._tail = self._tail or b" "
        else:
            self._tail = self._tail[-16:] + data
        if self._tail.endswith(b"0\r\n\r\n"):
            if time.perf_counter() < self._until:
                self._send()
            else:
                self._end()

    def connection_lost(self, error: Exception | None) -> None:
        """A connection that ends before its time is a failure."""
        if not self.done.done():
            self._tally.failed.append(f"connection lost: {error}")
            self.done.set_result(None)

    def _end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)
        self._transport.close()


async def drive(server: Server, concurrency: int, seconds: float) -> dict[str, Any]:
    """Send requests for `seconds`; returns percentiles."""
    parts = urlsplit(server.url)
    body = json.dumps({"model": server.model, "prompt": " ".join(["word"] * TOKENS), "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    head += f"x-tandem-token: {server.token}\r\n" if server.token else ""
    head += f"Authorization: Bearer {server.key}\r\n" if server.key else ""
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    tally, loop = Tally(), asyncio.get_running_loop()
    cpu, waited, start_time = time.process_time(), run_queue_s(), time.perf_counter()
    host, port = str(parts.hostname), int(parts.port or 80)
    connections = [
        (await loop.create_connection(lambda: Asker(request, start_time + seconds, tally), host, port))[1]
        for _ in range(concurrency)
    ]
    await asyncio.gather(*(asker.done for asker in connections))
    wall = time.perf_counter() - start_time
    return {
        "requests": len(tally.first),
        "first_ms": percentiles(tally.first),
        "added_ms": percentiles(tally.added),
        "generator_cpu": (time.process_time() - cpu) / wall,
        "generator_waited": (run_queue_s() - waited) / wall,
        "failed": tally.failed[:3],
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """The median and the 99th percentile; nothing of nothing."""
    if len(values) < 2:
        return {}
    return {"p50": statistics.median(values), "p99": statistics.quantiles(values, n=100)[98]}


@contextlib.contextmanager
def app(port: int) -> Iterator[tuple[Server, Server]]:
    """An app with one echo engine: the engine itself, and the app's front."""
    from tandem import settings
    from tandem.cluster.local import local_cluster

    with tempfile.TemporaryDirectory() as folder:
        settings.export({"TANDEM_HOME": folder}, override=True)
        with local_cluster(num_cpus=4) as cluster:
            import ray
            from ray import serve

            from tandem.apps.build import build_app
            from tandem.config import ServeConfig, ServedModelConfig

            model = ServedModelConfig(model="echo", name="echo", engine="echo", engine_args={"delay_s": GAP_S})
            ray.init(address=cluster.address, namespace="tandem", log_to_driver=False, logging_level=logging.ERROR)
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
            key = make_key()
            serve.run(build_app(ServeConfig(models=(model,)), check=False), name="tandem", route_prefix="/")
            directory = serve.get_deployment_handle("Directory", "tandem")
            replica = directory.watch.remote(0).result(timeout_s=30).replicas[0]
            yield Server(replica.url, "echo", replica.token), Server(f"http://127.0.0.1:{port}", "echo", key=key)
            ray.shutdown()


def summarise(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the rounds."""
    figures = {}
    for name in BARS_MS:
        figures[f"gateway, by its header, {name}"] = statistics.median(r["app"]["added_ms"][name] for r in rounds)
        for way in ("engine", "app"):
            figures[f"first byte, {way}, {name}"] = statistics.median(r[way]["first_ms"][name] for r in rounds)
        figures[f"first byte, app less engine, {name}"] = statistics.median(
            r["app"]["first_ms"][name] - r["engine"]["first_ms"][name] for r in rounds
        )
    return figures


def main() -> int:
    """Measure; 1 if a bar is missed and --check is given."""
    parser = options_parser(__doc__, smoke="one round of 2 s")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.seconds = 1, 2.0
    from tandem.cluster.ports import free_ports

    with app(free_ports(1)[0]) as (engine, front):
        for server in (engine, front):
            uvloop.run(drive(server, 8, 2.0))
        ways = (("engine", engine), ("app", front))
        rounds = Rounds(options.json)
        for _ in range(options.rounds):
            rounds.append(
                {way: uvloop.run(drive(server, options.concurrency, options.seconds)) for way, server in ways}
            )
    failed = [reason for result in rounds for way in result.values() for reason in way["failed"]]
    if failed:
        print(f"{len(failed)} requests failed: {failed[0]}", file=sys.stderr)
        return 1
    figures = summarise(rounds)
    title = f"Milliseconds, medians of {options.rounds} rounds at {options.concurrency} concurrent streams"
    columns, cells = ("what", "ms"), [(name, f"{value:.2f}") for name, value in figures.items()]
    show(title, columns, cells)
    load = (
        max(result["app"]["generator_cpu"] for result in rounds),
        max(result["app"]["generator_waited"] for result in rounds),
    )
    print(f"The generator took {load[0]:.0%} of a core and waited {load[1]:.0%} of the time for one.")
    verdicts = [
        Verdict(value <= bar, bar / value, f"the gateway adds {value:.2f} ms at {name} (bar {bar:g})")
        for name, bar in BARS_MS.items()
        if (value := figures[f"gateway, by its header, {name}"])
    ]
    page = (
        f"# What the gateway adds\n\nMade by `python -m bench.serving.gateway_latency --json ...`. {title}.\n\n"
        f"{markdown_table(columns, cells)}\n\n{verdict_lines(verdicts)}\n"
    )
    write(options.json, {"concurrency": options.concurrency, "rounds": rounds}, page)
    return judge(verdicts, check=options.check)


if __name__ == "__main__":
    sys.exit(main())
