"""What faults cost an app under load: parts of it are killed at random, and every answer is looked at.

    python bench/chaos_serve.py [--minutes 5] [--every 15] [--seed N] [--engine vllm|echo] [--quick] [--json FILE] [--check]

An app with two engine replicas and two gateways, on a cluster of two nodes, is asked by eight clients, half of them streaming.
Every `--every` seconds one fault is done to it, drawn by the seed: an engine's process killed (SIGKILL) or stopped (SIGSTOP), a
replica, a gateway, Serve's controller or HAProxy killed, or the second node with all that runs there. Clients do what the OpenAI
SDK does: where nothing took their request, or a 429 or 503 says when, they try again. Any other end of a request is a failure.

`--check` exits 1 unless every answer was right, nothing hung, and each failed request was under way when a part that carried
it was hit. Printed for each fault: requests that failed, seconds without any answer, seconds until all parts were there again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import report
from chaos_app import GATEWAYS, REPLICAS, Node, listener, records, serving, title
from report import Verdict

CLIENTS = 8
WORDS = 60
"""Tokens of an answer."""
PATIENCE_S = 120.0
"""A request that has no end by then has hung."""
BOOKS_S = 2.0
CARRIED_S = 30.0
"""A request that was under way when something was hit fails within this time, or for another reason."""
FAULTS = ("engine killed", "engine stopped", "replica killed", "gateway killed", "controller killed", "HAProxy killed",
          "node killed")  # fmt: skip
CARRIES_ALL = ("gateway killed", "HAProxy killed", "node killed")
"""Parts that may carry any request; of the others the answer says whether they did."""


@dataclass(slots=True)
class Asked:
    """One request and what became of it."""

    began: float
    streamed: bool
    ended: float = 0.0
    replica: str = ""
    """Which engine replica answered, by the answer's header."""
    again: int = 0
    """How often nothing took it, and it was sent again."""
    outcome: str = "right"


@dataclass(slots=True)
class Fault:
    """One thing that was done to the app."""

    kind: str
    at: float
    replica: str = ""
    """The engine replica that was hit, if it was one."""
    recovered_s: float | None = None
    failed: int = 0
    silence_s: float = 0.0


@dataclass(slots=True)
class Clients:
    """Asks until it is told to stop."""

    url: str
    model: str
    expected: dict[str, str] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    over: bool = False

    async def run(self) -> None:
        """All clients."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            for prompt in PROMPTS:
                self.expected[prompt] = await self._say(session, prompt, Asked(0.0, False))
            print("the answers are known", file=sys.stderr, flush=True)
            await asyncio.gather(*(self._ask(session, number) for number in range(CLIENTS)))

    async def _ask(self, session: aiohttp.ClientSession, number: int) -> None:
        dice = random.Random(number)
        while not self.over:
            asked = Asked(time.monotonic(), number % 2 == 0)
            self.asked.append(asked)
            prompt = dice.choice(PROMPTS)
            try:
                async with asyncio.timeout(PATIENCE_S):
                    said = await self._say(session, prompt, asked)
                if said != self.expected[prompt]:
                    asked.outcome = f"wrong: {said[:80]!r}"
            except TimeoutError:
                asked.outcome = "hung"
            except (aiohttp.ClientError, OSError, Broken, ValueError, KeyError) as error:
                asked.outcome = f"broken: {type(error).__name__}: {error}"[:200]
            asked.ended = time.monotonic()

    async def _say(self, session: aiohttp.ClientSession, prompt: str, asked: Asked) -> str:
        body = {"model": self.model, "prompt": prompt, "max_tokens": WORDS, "temperature": 0, "ignore_eos": True}
        while True:
            asked.replica = ""
            try:
                async with session.post(
                    f"{self.url}/v1/completions", json={**body, "stream": asked.streamed}
                ) as answer:
                    asked.replica = answer.headers.get("x-tandem-replica", "")
                    if answer.status in (429, 503):
                        wait_s = float(answer.headers["retry-after"])
                    elif answer.status != 200:
                        raise Broken(f"{answer.status}: {(await answer.text())[:150]}")
                    elif asked.streamed:
                        return told((await answer.read()).decode())
                    else:
                        return str((await answer.json())["choices"][0]["text"])
            except aiohttp.ClientConnectorError:
                wait_s = 0.5
            asked.again += 1
            await asyncio.sleep(min(wait_s, 1.0))


PROMPTS = tuple(
    f"one two three four {first} {second}" for first in ("five", "six") for second in ("one", "two", "three")
)


class Broken(Exception):
    """An answer that is none."""


def told(stream: str) -> str:
    """The text of a stream of completions; Broken if it does not end as one should."""
    if "data: [DONE]" not in stream:
        raise Broken(f"the stream ends with {stream[-150:]!r}")
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    if any("error" in event for event in events):
        raise Broken(f"the stream ends with {stream[-150:]!r}")
    return "".join(choice["text"] for event in events for choice in event["choices"])


class Chaos:
    """Does the faults, and watches the app recover; in a thread of its own, beside the clients' loop."""

    def __init__(self, cluster: Any, node: Node, url: str, kinds: list[str], every_s: float, seed: int) -> None:
        self.faults: list[Fault] = []
        self._cluster, self._node, self._url = cluster, node, url
        self._plan = kinds
        self._every_s = every_s
        self._dice = random.Random(seed)

    def run(self) -> None:
        """All faults, one every so many seconds, then the last recovery."""
        began = time.monotonic()
        for number, kind in enumerate(self._plan):
            self._watch(until=began + number * self._every_s)
            fault = Fault(kind, time.monotonic())
            try:
                self._do(fault)
            except IndexError:
                print(f"{kind}: not there now", file=sys.stderr, flush=True)
                continue
            fault.at = time.monotonic()
            self.faults.append(fault)
            print(f"{fault.at - began:5.0f} s: {kind} {fault.replica}", file=sys.stderr, flush=True)
        self._watch(until=time.monotonic() + 180.0, last=True)

    def _watch(self, until: float, *, last: bool = False) -> None:
        while (now := time.monotonic()) < until:
            open_faults = [fault for fault in self.faults if fault.recovered_s is None]
            # What was just killed may still be in everybody's books.
            settled = [fault for fault in open_faults if now - fault.at > BOOKS_S or not fault.replica]
            if settled and self._whole():
                hit = {fault.replica for fault in settled} & {
                    record.id for record in records() if record.state == "ready"
                }
                for fault in settled:
                    if fault.replica not in hit:
                        fault.recovered_s = round(now - fault.at, 1)
            if last and not open_faults:
                return
            time.sleep(0.3)

    def _whole(self) -> bool:
        """Whether every part is there, by Serve's and by the app's own account."""
        from ray import serve

        with contextlib.suppress(Exception):
            status = serve.status()
            deployments = status.applications["tandem"].deployments
            running = {name: each.replica_states.get("RUNNING", 0) for name, each in deployments.items()}
            engines = sum(count for name, count in running.items() if name.startswith("engine-"))
            import httpx

            ready = httpx.get(f"{self._url}/health", timeout=2).json()["ready_replicas"]
            return (
                engines == REPLICAS == sum(ready.values())
                and running["Gateway"] == GATEWAYS
                and not any(record.state == "stuck" for record in records())
                and all(each.status == "HEALTHY" for each in deployments.values())
            )
        return False

    def _do(self, fault: Fault) -> None:
        if fault.kind == "node killed":
            self._node.kill()
            threading.Timer(4.0, self._node.start).start()
            return
        if fault.kind in ("engine killed", "engine stopped", "replica killed"):
            record, process = self._dice.choice([(r, p) for r in records() if (p := listener(r)) is not None])
            fault.replica = record.id
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
        self._dice.choice([p for p in self._cluster_processes() if title(p).startswith(name)]).kill()

    def _cluster_processes(self) -> list[psutil.Process]:
        from tandem.cluster import marked

        # A haproxy that gave its listeners to the next one is none of the app's parts any more.
        found = sorted(marked(self._cluster.mark), key=lambda p: p.create_time())
        haproxies = [p for p in found if title(p).startswith("haproxy")]
        return [p for p in found if p not in haproxies[:-1]]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run clients and faults."""
    dice = random.Random(options.seed)
    count = max(len(FAULTS), int(60 * options.minutes / options.every)) if not options.quick else len(FAULTS)
    # Each kind as often as the others, in an order of its own.
    kinds = [kind for _ in range(1 + count // len(FAULTS)) for kind in dice.sample(FAULTS, len(FAULTS))][:count]
    kinds = options.faults or kinds
    with serving(options.engine) as (cluster, node, url):
        clients = Clients(url, "tiny")
        thread = threading.Thread(target=lambda: asyncio.run(clients.run()), daemon=True)
        thread.start()
        while len(clients.asked) < 2 * CLIENTS:
            time.sleep(0.1)
        chaos = Chaos(cluster, node, url, kinds, options.every, options.seed)
        began = time.monotonic()
        chaos.run()
        lasted_s = time.monotonic() - began
        clients.over = True
        thread.join(PATIENCE_S + 10)
    account(chaos.faults, clients.asked)
    failures = [asked for asked in clients.asked if asked.outcome != "right"]
    return {
        "engine": options.engine, "seed": options.seed, "every_s": options.every, "seconds": round(lasted_s),
        "cores": os.cpu_count(), "requests": len(clients.asked), "again": sum(asked.again for asked in clients.asked),
        "failed": len(failures), "wrong": sum(asked.outcome.startswith("wrong") for asked in failures),
        "hung": sum(asked.outcome == "hung" for asked in failures),
        "unexplained": [asdict(asked) for asked in failures if explained(asked, chaos.faults) is None],
        "failures": [asdict(asked) for asked in failures], "faults": [asdict(fault) for fault in chaos.faults],
    }  # fmt: skip


def explained(asked: Asked, faults: list[Fault]) -> Fault | None:
    """The fault that a failed request was under way for, on the part that was hit."""
    for fault in faults:
        carried = fault.kind in CARRIES_ALL or (fault.replica and asked.replica == fault.replica)
        if carried and asked.began <= fault.at + 0.5 and fault.at - 0.5 <= asked.ended <= fault.at + CARRIED_S:
            return fault
    return None


def account(faults: list[Fault], asked: list[Asked]) -> None:
    """Find out what each fault cost."""
    right = sorted(each.ended for each in asked if each.outcome == "right")
    for fault, after in zip(faults, [*faults[1:], None], strict=True):
        until = after.at if after is not None else fault.at + 30.0
        fault.failed = sum(each.outcome != "right" and explained(each, faults) is fault for each in asked)
        ends = [max((end for end in right if end <= fault.at), default=fault.at)]
        ends += [end for end in right if fault.at < end <= until] + [until]
        fault.silence_s = round(max(b - a for a, b in itertools.pairwise(ends)), 1)


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row for each kind of fault."""
    rows = []
    for kind in FAULTS:
        these = [fault for fault in results["faults"] if fault["kind"] == kind]
        if these:
            took = [fault["recovered_s"] for fault in these if fault["recovered_s"] is not None]
            silent = [fault["silence_s"] for fault in these]
            rows.append([
                kind, str(len(these)), str(sum(fault["failed"] for fault in these)),
                f"{statistics.median(silent):.1f} ({max(silent):.1f})",
                f"{statistics.median(took):.1f} ({max(took):.1f})" if len(took) == len(these) else "not within 180",
            ])  # fmt: skip
    return ["fault", "times", "failed requests", "longest without an answer, s: median (most)",
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
    ]  # fmt: skip


def main() -> int:
    """Run it; 1 if a bar is missed and --check is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--every", type=float, default=15.0, help="seconds between faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("vllm", "echo"), default="vllm")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, help="these, in this order, and no others")
    parser.add_argument("--quick", action="store_true", help="each fault once")
    parser.add_argument("--json", type=Path, help="write the figures here, and as a page beside it")
    parser.add_argument("--check", action="store_true", help="exit 1 where a bar is missed")
    options = parser.parse_args()
    results = measure(options)
    columns, rows = table(results)
    report.show("Faults under load", columns, rows)
    for failure in results["failures"]:
        print(f"  {failure['outcome']}")
    page = f"# Faults under load\n\nMade by `python bench/chaos_serve.py --json ...`: {REPLICAS} replicas ({results['engine']}), "
    page += f"{GATEWAYS} gateways, {CLIENTS} clients, {results['requests']} requests in {results['seconds']} s, a fault every "
    page += f"{results['every_s']:g} s.\n\n{report.lines(columns, rows)}\n\n{report.ends(verdicts(results))}\n"
    report.write(options.json, results, page)
    return report.judge(verdicts(results), check=options.check)


if __name__ == "__main__":
    sys.exit(main())
