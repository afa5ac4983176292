"""The router in a simulation: the gateways' own code (tandem.routing.router) chooses among up to 1,000 simulated replicas.

    python -m bench.routing.router_sim [--smoke] [--trace FILE] [--write-trace FILE] [--policies NAME ...] [--json FILE] [--check]

The traffic is made up or recorded (bench/routing/router_trace.py). All policies get the same. Simulated around the router:

- Gateways (`--gateways`) that share nothing and take requests at random (but those of `prefix_tree` share what they remember of
  texts, as Ray's routers do, by a tree in an actor; that the actor's answers take time is left out). Each hears of loads and
  adapters once a second, and what it hears is up to another second old, as each replica describes itself once a second: staler
  than in the real thing, where changes of adapters travel at once. Its own requests it knows to the moment.
- Engines: `SLOTS` requests at once. The oldest waiting request is read first, alone: `PREFILL_S` for each of its tokens that the
  prefix cache does not have, while the others pause. Then all running requests get a token every `STEP_S` + `STEP_REQUEST_S` x
  their number. The prefix cache has `CACHE_BLOCKS` blocks of 64 tokens, the longest unused goes first; a block is of use if all
  before it are there.
- Adapters: `ADAPTER_SLOTS` a replica. One that is missing is loaded in `LOAD_S`, in the place of the longest unused that no
  request uses; its requests wait for that, others do not.

The usual rate is one that engines carry only where much is found in caches; the other scenario is at half of it, which all carry.
A decision is timed whole: choosing, and remembering where the request went; reading how the text of a request begins is timed
apart. Hit rates and times are of the second half of the trace, when caches are warm. Imbalance is the 99th percentile of the
replicas' requests over their mean, each second, median.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import os
import random
import statistics
import sys
import time
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness import report
from bench.harness.options import options_parser
from bench.harness.report import Verdict
from bench.routing import router_trace
from bench.routing.router_trace import BLOCK, Call, Shape
from tandem.config import RouterConfig, ServedModelConfig
from tandem.engine.protocol import AdapterRef
from tandem.gateway.models.catalog import ResolvedModel
from tandem.gateway.requests.request_hints import read_routing_request
from tandem.routing.policies import POLICIES
from tandem.routing.records import ReplicaRecord, ServedModel, Snapshot
from tandem.routing.request import PREFIX_LENGTHS, RoutingRequest
from tandem.routing.router import Router

BAR_US = 100.0
"""99 of 100 decisions of the default policy are faster, at `BAR_REPLICAS`."""
BAR_REPLICAS = 1000
SLOTS = 32
PREFILL_S = 100e-6
STEP_S, STEP_REQUEST_S = 10e-3, 0.25e-3
CACHE_BLOCKS = 1024
ADAPTER_SLOTS, LOAD_S = 8, 0.1
BYTES_PER_TOKEN = 4
"""Bytes of text for each token, to convert a trace's blocks to the router's prefix lengths."""
NAMES = {
    "affinity": "affinity (default)",
    "round_robin": "round robin",
    "least_loaded": "least loaded",
    "two_choices": "two choices",
    "prefix_tree": "prefix-aware rule",
}


def main() -> int:
    parser = options_parser(
        __doc__, smoke="50 replicas, 20 seconds", check=f"exit 1 if the default's p99 is not below {BAR_US:.0f} us"
    )
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--replicas", type=int, help="instead of the four scenarios: one with so many replicas")
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--gateways", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second for each replica")
    parser.add_argument("--bursty", action="store_true")
    parser.add_argument("--trace", type=Path, help="a recorded trace, instead of made-up traffic")
    parser.add_argument("--write-trace", type=Path, help="write the made-up traffic of the first scenario there")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=NUMBER", help="keys of the router's config")
    options = parser.parse_args()
    settings: dict[str, Any] = {key: float(value) for key, _, value in (pair.partition("=") for pair in options.set)}
    finished_scenarios = report.Rounds(options.json)
    results: dict[str, Any] = {
        "load_before": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "scenarios": finished_scenarios,
    }
    for scenario in scenarios(options):
        calls = scenario.calls()
        if options.write_trace:
            router_trace.write(calls, options.write_trace)
            options.write_trace = None
        rows = []
        for policy in options.policies:
            rows.append(Simulation(scenario, RouterConfig(policy=policy, **settings)).run(calls))
            gc.collect()
        finished_scenarios.append({"title": scenario.title, "replicas": scenario.replicas, "rows": rows})
        report.show(scenario.title, COLUMNS, [cells(row) for row in rows], width=150)
    results["reading"] = time_request_reading()
    report.show("Reading a request for the router, microseconds", READING, read_rows(results), width=80)
    report.write(options.json, results, page(results))
    return report.judge(verdicts(results), check=options.check)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A fleet and its traffic."""

    replicas: int
    gateways: int
    shape: Shape
    trace: Path | None = None

    @property
    def title(self) -> str:
        """Description of the scenario in one line."""
        shape = self.shape
        traffic = (
            f"{shape.adapters:,} adapters, {shape.rate:,.0f} requests/s {'in bursts' if shape.bursty else ''}".strip()
        )
        return f"{self.replicas:,} replicas, {self.gateways} gateways, {f'trace {self.trace.name}' if self.trace else traffic}"

    def calls(self) -> list[Call]:
        """The traffic."""
        return router_trace.recorded(self.trace) if self.trace else router_trace.made_up(self.shape)


def scenarios(options: argparse.Namespace) -> list[Scenario]:
    """The scenarios that the options select."""

    def scenario(replicas: int, adapters: int, seconds: float, bursty: bool, load: float = 1.0) -> Scenario:
        shape = Shape(rate=options.rate * load * replicas, seconds=seconds, adapters=adapters, bursty=bursty)
        return Scenario(replicas=replicas, gateways=options.gateways, shape=shape, trace=options.trace)

    if options.smoke:
        return [scenario(50, 5_000, 20.0, False)]
    if options.replicas or options.trace:
        return [scenario(options.replicas or 16, options.adapters, options.seconds, options.bursty)]
    return [
        scenario(1_000, 100_000, options.seconds, False),
        scenario(1_000, 100_000, options.seconds, True),
        scenario(1_000, 100_000, options.seconds, False, 0.5),
        scenario(16, 1_000, 4 * options.seconds, False),
    ]


# ---- the engines ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Work:
    """A request in the simulation."""

    call: Call
    request: RoutingRequest
    gateway: int
    replica: int
    measured: bool
    """Whether it belongs to the measured second half."""


@dataclass(slots=True)
class Engine:
    """One simulated replica. Its clock of tokens stands still while a prompt is read."""

    id: str
    adapters: OrderedDict[str, int] = field(default_factory=OrderedDict)
    """Resident or loading, the longest unused first, with the requests that use it."""
    loading: dict[str, list[Work]] = field(default_factory=dict)
    waiting_for_slot: deque[Work] = field(default_factory=deque)
    """Requests that wait for a free adapter slot."""
    waiting: deque[Work] = field(default_factory=deque)
    reading: Work | None = None
    running: list[tuple[float, int, Work]] = field(default_factory=list)
    """By the reading of the token clock at which they end."""
    tokens: float = 0.0
    at: float = 0.0
    epoch: int = 0
    cache: dict[int, None] = field(default_factory=dict)

    @property
    def requests(self) -> int:
        """Number of requests in the engine, in any state."""
        waiting_for_adapters = len(self.waiting_for_slot) + sum(map(len, self.loading.values()))
        return len(self.running) + len(self.waiting) + (self.reading is not None) + waiting_for_adapters

    def step_s(self) -> float:
        """A token for each running request."""
        return STEP_S + STEP_REQUEST_S * len(self.running)

    def advance(self, now: float) -> None:
        """Move the token clock on."""
        if self.reading is None and self.running:
            self.tokens += (now - self.at) / self.step_s()
        self.at = now

    def cached(self, call: Call) -> int:
        """Blocks of a prompt that need not be read."""
        cache, cached_blocks = self.cache, 0
        for number in range(call.count):
            if call.blocks[number] not in cache:
                break
            cached_blocks += 1
        # The last token is always read, for what it predicts.
        return min(cached_blocks, call.count - 1)

    def keep(self, call: Call) -> None:
        """Put a prompt into the prefix cache."""
        cache = self.cache
        for number in range(call.count - 1, -1, -1):
            block = call.blocks[number]
            cache.pop(block, None)
            cache[block] = None
        for _ in range(len(cache) - CACHE_BLOCKS):
            del cache[next(iter(cache))]

    def record(self) -> ReplicaRecord:
        """The engine's report to the gateways."""
        running = len(self.running) + (self.reading is not None)
        adapters = tuple(name for name in self.adapters if name not in self.loading)
        return ReplicaRecord(
            id=self.id, pool="base@1", url="", token="", running=running, waiting=self.requests - running, adapters=adapters
        )  # fmt: skip


# ---- the simulation -------------------------------------------------------------------------------------------------


class Simulation:
    """One policy under one scenario's traffic."""

    def __init__(self, scenario: Scenario, config: RouterConfig) -> None:
        self._config = config
        self._random = random.Random(1)
        self._engines = [Engine(f"replica-{number}") for number in range(scenario.replicas)]
        self._numbers = {engine.id: number for number, engine in enumerate(self._engines)}
        self._records = [engine.record() for engine in self._engines]
        self._routers = [
            Router(config, random.Random(seed), gateways=scenario.gateways) for seed in range(scenario.gateways)
        ]
        if config.policy == "prefix_tree":
            for router in self._routers:
                router._prefixes = self._routers[0]._prefixes
        self._events: list[tuple[float, int, Any, Any]] = []
        self._count = 0
        self._decisions_ns: list[int] = []
        self._updates_s: list[float] = []
        self._queue_s: list[float] = []
        self._first_token_s: list[float] = []
        self._imbalance: list[float] = []
        self._tally: Counter[str] = Counter()

    def run(self, calls: list[Call]) -> dict[str, Any]:
        """The policy's figures."""
        start_time, end = time.perf_counter(), calls[-1].at
        for number in range(len(self._engines)):
            self._schedule(self._random.random(), self._report_replica, number)
        for number, router in enumerate(self._routers):
            router.update(Snapshot(version=1, replicas=tuple(self._records)))
            self._schedule(self._random.random(), self._update_router, number)
        self._schedule(1.0, self._sample_balance, None)
        arrivals = iter(calls)
        call = next(arrivals)
        gc.disable()  # nothing here has cycles, and a simulation of this size is nothing that a gateway would collect
        try:
            while True:
                if self._events and self._events[0][0] <= call.at:
                    now, _, handler, argument = heapq.heappop(self._events)
                    handler(now, argument)
                    continue
                self._route(call, measured=call.at >= end / 2)
                following = next(arrivals, None)
                if following is None:
                    break
                call = following
        finally:
            gc.enable()
        return self._figures(time.perf_counter() - start_time)

    def _schedule(self, when: float, handler: Any, argument: Any) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, handler, argument))

    # Gateways

    def _route(self, call: Call, *, measured: bool) -> None:
        number = int(self._random.random() * len(self._routers))
        router = self._routers[number]
        blocks = tuple(
            call.blocks[bound // (BLOCK * BYTES_PER_TOKEN) - 1]
            for bound in PREFIX_LENGTHS
            if bound <= call.count * BLOCK * BYTES_PER_TOKEN
        )
        request = RoutingRequest(
            pool="base@1",
            adapter=call.adapter,
            prefix_hashes=blocks,
            size=min(PREFIX_LENGTHS[-1], call.count * BLOCK * BYTES_PER_TOKEN),
            session=call.session,
        )
        start_ns = time.perf_counter_ns()
        replica = router.choose(request)
        assert replica is not None
        router.request_started(request, replica.id)
        self._decisions_ns.append(time.perf_counter_ns() - start_ns)
        self._admit(call.at, Work(call, request, number, self._numbers[replica.id], measured))

    def _update_router(self, now: float, number: int) -> None:
        snapshot = Snapshot(version=int(now), replicas=tuple(self._records))
        start_time = time.perf_counter()
        self._routers[number].update(snapshot)
        self._updates_s.append(time.perf_counter() - start_time)
        self._schedule(now + 1.0, self._update_router, number)

    def _report_replica(self, now: float, number: int) -> None:
        self._records[number] = self._engines[number].record()
        self._schedule(now + 1.0, self._report_replica, number)

    def _sample_balance(self, now: float, _: None) -> None:
        requests = sorted(engine.requests for engine in self._engines)
        self._imbalance.append(requests[int(0.99 * (len(requests) - 1))] / max(1e-9, statistics.fmean(requests)))
        self._schedule(now + 1.0, self._sample_balance, None)

    # Replicas

    def _admit(self, now: float, work: Work) -> None:
        engine, adapter = self._engines[work.replica], work.call.adapter
        if adapter is None:
            engine.waiting.append(work)
            self._advance_engine(now, engine)
            return
        if work.measured:
            self._tally["adapter requests"] += 1
            self._tally["adapter hits"] += adapter in engine.adapters
        if adapter in engine.adapters:
            engine.adapters[adapter] += 1
            engine.adapters.move_to_end(adapter)
            if adapter in engine.loading:
                engine.loading[adapter].append(work)
            else:
                engine.waiting.append(work)
                self._advance_engine(now, engine)
        else:
            self._load(now, engine, work)

    def _load(self, now: float, engine: Engine, work: Work) -> bool:
        adapter = work.call.adapter
        assert adapter is not None
        if adapter in engine.adapters:  # another request has had it loaded meanwhile
            engine.adapters[adapter] += 1
            engine.loading.get(adapter, engine.waiting).append(work)
            return True
        if len(engine.adapters) >= ADAPTER_SLOTS:
            unused = next((name for name, users in engine.adapters.items() if not users), None)
            if unused is None:
                engine.waiting_for_slot.append(work)
                return False
            del engine.adapters[unused]
        engine.adapters[adapter] = 1
        engine.loading[adapter] = [work]
        self._schedule(now + LOAD_S, self._finish_loading, (engine, adapter))
        return True

    def _finish_loading(self, now: float, engine_and_adapter: tuple[Engine, str]) -> None:
        engine, adapter = engine_and_adapter
        engine.waiting.extend(engine.loading.pop(adapter))
        self._advance_engine(now, engine)

    def _advance_engine(self, now: float, engine: Engine) -> None:
        """Start the next prefill if a slot is free, and schedule the engine's next event."""
        if engine.reading is not None:
            return
        engine.advance(now)
        if engine.waiting and len(engine.running) < SLOTS:
            work = engine.reading = engine.waiting.popleft()
            cached = engine.cached(work.call)
            if work.measured:
                self._queue_s.append(now - work.call.at)
                self._tally["blocks"] += work.call.count
                self._tally["cached"] += cached
            engine.epoch += 1
            self._schedule(now + (work.call.count - cached) * BLOCK * PREFILL_S, self._finish_prefill, engine)
        elif engine.running:
            engine.epoch += 1
            remaining_s = (engine.running[0][0] - engine.tokens) * engine.step_s()
            self._schedule(now + max(0.0, remaining_s), self._finish_decode, (engine, engine.epoch))

    def _finish_prefill(self, now: float, engine: Engine) -> None:
        work = engine.reading
        assert work is not None
        engine.at = now
        engine.reading = None
        engine.keep(work.call)
        if work.measured:
            self._first_token_s.append(now - work.call.at)
        self._routers[work.gateway].adapter_loaded(work.request, engine.id)
        self._count += 1
        heapq.heappush(engine.running, (engine.tokens + work.call.output, self._count, work))
        self._advance_engine(now, engine)

    def _finish_decode(self, now: float, engine_and_epoch: tuple[Engine, int]) -> None:
        engine, epoch = engine_and_epoch
        if engine.epoch != epoch:
            return
        engine.advance(now)
        work = heapq.heappop(engine.running)[2]
        engine.tokens = max(engine.tokens, 0.0)
        self._routers[work.gateway].request_ended(work.request, engine.id)
        self._tally["done"] += 1
        if work.call.adapter is not None:
            engine.adapters[work.call.adapter] -= 1
            for _ in range(len(engine.waiting_for_slot)):
                if not self._load(now, engine, engine.waiting_for_slot.popleft()):
                    break
        self._advance_engine(now, engine)

    def _figures(self, seconds: float) -> dict[str, Any]:
        tally = self._tally
        figures: dict[str, Any] = {"policy": self._config.policy, "requests": len(self._decisions_ns)}
        for name, values, scale in (
            ("decision_us", self._decisions_ns, 1e-3),
            ("update_ms", self._updates_s, 1e3),
            ("queue_ms", self._queue_s, 1e3),
            ("first_token_ms", self._first_token_s, 1e3),
        ):
            ordered = sorted(values)
            figures[name] = {q: round(scale * ordered[int(q * (len(ordered) - 1))], 2) for q in (0.5, 0.99)}
        figures["adapter_hits"] = round(tally["adapter hits"] / max(1, tally["adapter requests"]), 4)
        figures["prefix_hits"] = round(tally["cached"] / max(1, tally["blocks"]), 4)
        figures["imbalance"] = round(statistics.median(self._imbalance[len(self._imbalance) // 2 :]), 3)
        figures["unfinished"] = len(self._decisions_ns) - tally["done"]
        figures["seconds"] = round(seconds, 1)
        return figures


def time_request_reading() -> list[dict[str, Any]]:
    """Time to read the prefix hashes of a request's text, without the router."""
    model = ServedModel(id="base@1", name="base", path="", config=ServedModelConfig(model="base", engine="vllm"))
    target = ResolvedModel(base=model, adapter=AdapterRef(id="red@1", path="/red"))
    turn = "what a person may say in a turn of a conversation "
    bodies: dict[str, dict[str, Any]] = {
        "chat of 2 short messages": {
            "messages": [{"role": "system", "content": turn}, {"role": "user", "content": turn}]
        },
        "chat of 20 messages, 8 KiB": {"messages": [{"role": "user", "content": turn * 8}] * 20},
        "prompt of 8 KiB": {"prompt": turn * (8192 // len(turn))},
        "prompt of 1 MiB": {"prompt": turn * (2**20 // len(turn))},
        "prompt of 4,000 token ids": {"prompt": list(range(4000))},
    }
    rows = []
    for name, body in bodies.items():
        samples = []
        for _ in range(2000):
            start_ns = time.perf_counter_ns()
            read_routing_request(target, body, {})
            samples.append((time.perf_counter_ns() - start_ns) / 1000)
        samples.sort()
        rows.append({"request": name, "p50_us": round(samples[1000], 1), "p99_us": round(samples[1980], 1)})
    return rows


# ---- results ---------------------------------------------------------------------------------------------------------

READING = ("request", "p50", "p99")
COLUMNS = (
    "policy", "decision us p50, p99", "adapter hits", "prefix hits", "imbalance", "queue ms p50, p99", "first token ms p50, p99",
    "unfinished",
)  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text."""

    def two(key: str, digits: int) -> str:
        return ", ".join(f"{value:,.{digits}f}" for value in row[key].values())

    return [
        NAMES.get(row["policy"], row["policy"]), two("decision_us", 1), f"{row['adapter_hits']:.1%}", f"{row['prefix_hits']:.1%}",
        f"{row['imbalance']:.2f}", two("queue_ms", 0), two("first_token_ms", 0), f"{row['unfinished']:,}",
    ]  # fmt: skip


def read_rows(results: dict[str, Any]) -> list[list[str]]:
    """Durations of `reading`, as text."""
    return [[row["request"], f"{row['p50_us']:.1f}", f"{row['p99_us']:.1f}"] for row in results["reading"]]


def verdicts(results: dict[str, Any]) -> list[Verdict]:
    """The default policy's decisions at 1,000 replicas, held against the bar."""
    verdict_list = []
    for scenario in results["scenarios"]:
        for row in scenario["rows"]:
            if row["policy"] == RouterConfig().policy and scenario["replicas"] >= BAR_REPLICAS:
                slow = row["decision_us"][0.99]
                message = f"{scenario['title']}: 99 of 100 decisions within {slow:.1f} us; the bar is {BAR_US:.0f} us"
                verdict_list.append(Verdict(slow < BAR_US, BAR_US / slow, message))
    return verdict_list


def page(results: dict[str, Any]) -> str:
    """The result for a page."""
    parts = [
        "# The router, simulated\n\nMade by `python -m bench.routing.router_sim --json ...`; its docstring states the model.\n"
    ]
    for scenario in results["scenarios"]:
        slow = max(row["update_ms"][0.99] for row in scenario["rows"])
        parts.append(f"## {scenario['title']}\n\n{report.markdown_table(COLUMNS, map(cells, scenario['rows']))}\n")
        parts.append(f"Taking a snapshot of all replicas, once a second: at most {slow:.1f} ms (p99).\n")
    parts.append(
        f"## Reading a request for the router, microseconds\n\n{report.markdown_table(READING, read_rows(results))}\n"
    )
    return "\n".join([*parts, report.verdict_lines(verdicts(results)), ""])


if __name__ == "__main__":
    sys.exit(main())
