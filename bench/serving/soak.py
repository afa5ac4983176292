"""Minutes of mixed traffic on the served app: what memory it takes by then, and whether anything fails that was not made to fail.

    python -m bench.serving.soak [--minutes 10] [--smoke] [--json FILE] [--check]

Clients ask at random: prompts and answers of all lengths, streamed and whole, the base and adapters of which most are cold;
they leave in the middle, and send what must be refused. Status, length and end of each answer are held against what they have
to be. Memory is the resident set of the gateway, the replica and its engine; proportional sets, which move with whatever else
runs on the machine, are in the JSON. Growth is what each takes at the end, more than it did after a fifth of the time (2
minutes of 10). What may fill up to a limit is small here, so that it is full by then: the engine's KV cache and its steps, and
the router's memory of texts. For the same reason the traffic begins with what takes the most at once, the longest prompts by
all clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from safetensors.numpy import save_file

from bench.harness import report
from bench.harness.machine import machine
from bench.harness.models import write_model
from bench.harness.options import options_parser
from bench.harness.report import Verdict
from bench.harness.servers import ENVIRONMENT, free_port

GROWTH_BAR = 0.05
WARM_SHARE = 0.2
"""Share of the run before memory is first measured."""
SAMPLE_S = 2.0
AT_ONCE_S = 20.0
"""Seconds of samples that are averaged, at most: one sample is too noisy."""
CLIENTS, ADAPTERS, HIDDEN, LAYERS, RANK = 12, 24, 192, 4, 8
MAX_LENGTH = 1024
PEAK_S = 10.0
"""How long the traffic that it begins with lasts, at the most a tenth of the time."""
PARTS = {
    "gateway": "ServeReplica:tandem:Gateway",
    "replica": "ServeReplica:tandem:engine-",
    "engine": "VLLM::EngineCore",
}
TEXT = "import os\n\ndef main(path):\n    for name in os.listdir(path):\n        print(name)\n"


@dataclass
class Tally:
    """Counts and errors of the clients."""

    counts: Counter[str] = field(default_factory=Counter)
    """Requests by their kind."""
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    """Unexpected errors."""


class Client:
    """One of several clients that send requests without a pause."""

    def __init__(self, http: httpx.AsyncClient, dice: random.Random, tally: Tally) -> None:
        self._http, self._dice, self._tally = http, dice, tally
        self._kinds = {
            self.whole: 30, self.streamed: 30, self.chat: 10, self.leaves: 10, self.leaves_whole: 4, self.too_long: 3,
            self.wrong_value: 4, self.no_json: 3, self.unknown_model: 4, self.unknown_route: 2,
        }  # fmt: skip

    async def ask_until(self, peak: float, end: float) -> None:
        """Ask one thing after the other: the longest until `peak`, anything until `end`."""
        while (now := time.monotonic()) < end:
            kind = self.longest if now < peak else self._dice.choices(list(self._kinds), list(self._kinds.values()))[0]
            self._tally.counts[kind.__name__] += 1
            try:
                async with asyncio.timeout(60):
                    await kind()
            except Exception as error:
                self._tally.errors.append(f"{kind.__name__}: {type(error).__name__}: {error}"[:300])

    def _body(self, **changes: Any) -> dict[str, Any]:
        dice = self._dice
        model = "bench"
        if dice.random() < 0.5:
            # A few are asked often, most are cold.
            model = f"a{min(int(dice.paretovariate(0.7)), ADAPTERS) - 1}"
        start, length = dice.randrange(len(TEXT)), int(10 ** dice.uniform(1, 3.1))
        prompt = (TEXT * 20)[start : start + length]
        tokens = int(10 ** dice.uniform(0, 2.3))
        return {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, **changes}

    async def longest(self) -> None:
        """The longest prompt, which no cache holds, with an adapter, and the longest answer."""
        model, prompt = f"a{self._dice.randrange(ADAPTERS)}", f"# {self._dice.random()}\n{TEXT * 15}"
        await self.whole(model=model, prompt=prompt[:1250], max_tokens=400)

    async def whole(self, **changes: Any) -> None:
        """A completion in one piece."""
        body = self._body(**changes)
        answer = await self._http.post("/v1/completions", json=body)
        self._expect(answer, 200)
        self._count(answer.json()["usage"]["completion_tokens"], body["max_tokens"])

    async def chat(self) -> None:
        """A request that is refused in words of its own: the model has no chat template."""
        body = self._body(messages=[{"role": "user", "content": "hello"}])
        del body["prompt"]
        self._expect(await self._http.post("/v1/chat/completions", json=body), 400)

    async def streamed(self) -> None:
        """A completion as a stream, to its end."""
        body = self._body(stream=True)
        events, last = 0, ""
        async with self._http.stream("POST", "/v1/completions", json=body) as answer:
            self._expect(answer, 200)
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    events, last = events + 1, line
                    if line.startswith('data: {"error"'):
                        raise RuntimeError(line)
        if last != "data: [DONE]":
            raise RuntimeError(f"the stream ended with {last!r}")
        self._tally.tokens += events - 1

    async def leaves(self) -> None:
        """A client that leaves in the middle of a stream."""
        body, stay = self._body(stream=True, max_tokens=400, prompt=TEXT), self._dice.randrange(1, 20)
        async with self._http.stream("POST", "/v1/completions", json=body) as answer:
            self._expect(answer, 200)
            async for _ in answer.aiter_lines():
                stay -= 1
                if not stay:
                    return

    async def leaves_whole(self) -> None:
        """One that has no patience for an answer in one piece."""
        with contextlib.suppress(httpx.TimeoutException):
            await self._http.post("/v1/completions", json=self._body(max_tokens=600, prompt=TEXT), timeout=0.3)

    async def too_long(self) -> None:
        """More than the model takes."""
        self._expect(await self._http.post("/v1/completions", json=self._body(prompt=TEXT * 200)), 400)

    async def wrong_value(self) -> None:
        """A value of the wrong type."""
        self._expect(await self._http.post("/v1/completions", json=self._body(max_tokens="many")), 400)

    async def no_json(self) -> None:
        """Bytes that are no request."""
        self._expect(await self._http.post("/v1/completions", content=b'{"model": "bench", '), 400)

    async def unknown_model(self) -> None:
        """A model that does not exist."""
        self._expect(await self._http.post("/v1/completions", json=self._body(model="nobody")), 404)

    async def unknown_route(self) -> None:
        """A route that there is not."""
        self._expect(await self._http.post("/v1/nothing", json=self._body()), 404)

    def _count(self, tokens: int, expected: int) -> None:
        self._tally.tokens += tokens
        if tokens != expected:
            raise RuntimeError(f"{tokens} tokens instead of {expected}")

    def _expect(self, answer: httpx.Response, status: int) -> None:
        if answer.status_code != status:
            raise RuntimeError(f"status {answer.status_code} instead of {status}")


def main() -> int:
    """Run it; 1 if a bar is missed and --check is given."""
    parser = options_parser(__doc__, smoke="one minute: too short for the bar of memory")
    parser.add_argument("--minutes", type=float, default=10.0)
    options = parser.parse_args()
    minutes = 1.0 if options.smoke else options.minutes
    # What is not in the environment by now, no process of the cluster has.
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory(prefix="tb-", dir="/tmp") as name:
        os.environ["TANDEM_HOME"] = f"{name}/home"
        with app(Path(name)) as (port, mark):
            tally, series, seconds = asyncio.run(soak(port, mark, 60 * minutes, options.json))
    rows, verdicts = judge_soak(tally, series, seconds, check_growth=not options.smoke)
    columns = ("process", f"after {WARM_SHARE * minutes:g} min, MiB", f"after {minutes:g} min, MiB", "growth")
    report.show(f"{minutes:g} minutes of mixed traffic", columns, rows)
    counts_text = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in tally.counts.most_common())
    print(
        f"{sum(tally.counts.values()):,} requests ({counts_text}), {tally.tokens:,} tokens; {len(tally.errors)} errors unprovoked"
    )
    for error in tally.errors[:10]:
        print(f"  {error}")
    page = f"# Soak\n\nMade by `python -m bench.serving.soak --json ...`.\n\n{report.markdown_table(columns, rows)}\n\n"
    page += f"{sum(tally.counts.values()):,} requests ({counts_text}); {tally.tokens:,} tokens.\n\n"
    page += f"{report.verdict_lines(verdicts)}\n"
    figures = {"counts": tally.counts, "tokens": tally.tokens, "errors": tally.errors, "mib": series}
    report.write(options.json, {"machine": machine(), "seconds": seconds, **figures}, page)
    return report.judge(verdicts, check=options.check)


async def soak(port: int, mark: str, seconds: float, path: Path | None) -> tuple[Tally, list[dict[str, float]], float]:
    """Traffic for so long, and memory meanwhile."""
    tally, series, start_time = Tally(), report.Rounds(path), time.monotonic()
    end = start_time + seconds
    limits = httpx.Limits(max_connections=CLIENTS + 4)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits) as http:
        peak = start_time + min(PEAK_S, 0.1 * seconds)
        clients = [Client(http, random.Random(i), tally) for i in range(CLIENTS)]
        asking = [asyncio.create_task(client.ask_until(peak, end)) for client in clients]
        while time.monotonic() < end:
            sizes = await asyncio.to_thread(memory, mark)
            series.append({"at_s": round(time.monotonic() - start_time, 1), "requests": tally.counts.total(), **sizes})
            await asyncio.sleep(SAMPLE_S)
        await asyncio.gather(*asking)
    return tally, series, time.monotonic() - start_time


def judge_soak(
    tally: Tally, series: list[dict[str, float]], seconds: float, *, check_growth: bool
) -> tuple[list[tuple[str, ...]], list[Verdict]]:
    """The table's rows, and the bars."""
    warm, window = WARM_SHARE * seconds, min(AT_ONCE_S, 0.1 * seconds)
    rows: list[tuple[str, ...]] = []
    verdicts = []
    for part in PARTS:
        first = statistics.median(s[part] for s in series if warm <= s["at_s"] <= warm + window)
        last = statistics.median(s[part] for s in series if s["at_s"] >= seconds - window - SAMPLE_S)
        growth = last / first - 1
        rows.append((part, f"{first:,.1f}", f"{last:,.1f}", f"{growth:+.1%}"))
        if check_growth:
            message = f"the {part}'s memory grew by {growth:.1%} (bar below {GROWTH_BAR:.0%})"
            verdicts.append(Verdict(growth < GROWTH_BAR, GROWTH_BAR / max(growth, 1e-6), message))
    failed = len(tally.errors)
    verdicts.append(Verdict(not failed, 1 / (1 + failed), f"{failed} errors that were not provoked (bar 0)"))
    return rows, verdicts


def memory(mark: str) -> dict[str, float]:
    """MiB of each part: resident under its name, its proportional share under its name with `_pss`."""
    from tandem.cluster.marks import marked_processes

    sizes = {f"{part}{kind}": 0.0 for part in PARTS for kind in ("", "_pss")}
    for process in marked_processes(mark):
        with contextlib.suppress(psutil.Error, OSError):
            title = " ".join(process.cmdline())
            for part, name in PARTS.items():
                if name in title:
                    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
                    kib = {key: int(value.split()[0]) for key, _, value in (line.partition(":") for line in lines)}
                    sizes[part] += kib["Rss"] / 1024
                    sizes[f"{part}_pss"] += kib["Pss"] / 1024
    return {key: round(value, 1) for key, value in sizes.items()}


@contextlib.contextmanager
def app(folder: Path) -> Iterator[tuple[int, str]]:
    """The served app with one replica and its adapters; its port, and the mark of its cluster's processes."""
    from tandem.cluster.local import local_cluster
    from tandem.config import ListenConfig, RouterConfig, ServeConfig, ServedModelConfig
    from tandem.registry import Registry
    from tandem.sdk.serving import serving

    write_model(folder / "bench")
    registry = Registry.open()
    registry.register_model("bench", folder / "bench")
    for number in range(ADAPTERS):
        write_adapter(folder / f"a{number}", number)
        registry.register_adapter(f"a{number}", folder / f"a{number}", base="bench")
    model = ServedModelConfig(
        model="bench",
        max_adapters=4,
        max_cached_adapters=8,
        max_lora_rank=RANK,
        # 12 requests of 1,024 tokens fit, and the prefixes of some more. An engine's memory grows with the sizes of steps that it
        # has seen, whatever was in them: with 2,048 tokens it was still growing after 3 minutes.
        engine_args={"max_model_len": MAX_LENGTH, "num_gpu_blocks_override": 256, "max_num_batched_tokens": 256},
    )
    with local_cluster(num_cpus=8) as cluster:
        port = free_port()
        router = RouterConfig(remembered_blocks=2000, remembered_sessions=1000)
        with serving(cluster, ServeConfig(models=(model,), router=router), ListenConfig(port=port)):
            yield port, cluster.mark


def write_adapter(folder: Path, seed: int) -> None:
    """An adapter of the benchmark's model, in peft's format."""
    folder.mkdir()
    dice = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for kind in ("q_proj", "v_proj"):
            name = f"base_model.model.model.layers.{layer}.self_attn.{kind}"
            tensors[f"{name}.lora_A.weight"] = dice.standard_normal((RANK, HIDDEN)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = 0.01 * dice.standard_normal((HIDDEN, RANK)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    sys.exit(main())
