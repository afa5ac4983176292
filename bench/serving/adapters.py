"""Cost of adapters in the served app: cold starts, promotions, a thousand adapters under load, and the time from a training run.

    python -m bench.serving.adapters [--parts cold promotion zipf training] [--rounds N] [--json FILE] [--check]

One app with 2 replicas of a small Llama, 8 adapter slots each, is asked over HTTP as clients ask it. `cold`: the first token of
an adapter that no replica has seen, against its next one's. `promotion`: each promotion is followed at once by a request, with
others under way. `zipf`: a thousand adapters, asked with Zipf's frequencies, against the same requests to the base, and to 8
adapters that stay where they are: what is between the base and those is vLLM's own arithmetic. `training`: a LoRA job runs on the
app's cluster, and the app is asked for its adapter from the job's last step on.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvloop

from bench.harness.options import options_parser
from bench.harness.report import Rounds, Verdict, judge, markdown_table, show, verdict_lines, write
from bench.serving.adapters_app import RANK, SLOTS, App, register_many, serving, write_adapter
from tandem.observability.events import Failed, Finished, Step

COLD_MS, SHARE, TRAINED_S = 150.0, 0.8, 2.0
"""The bars."""


async def cold(app: App, names: Sequence[str]) -> dict[str, Any]:
    """Time to first token of adapters never used before, of the same again, and of those evicted from the slots meanwhile."""
    for _ in range(6):
        await app.first_token_ms("bench")
    first_ms, repeated_ms = [], []
    for name in names:
        first_ms.append(await app.first_token_ms(name))
        repeated_ms.append(await app.first_token_ms(name))
    in_memory = {
        adapter for replica in await app.residency() for adapter in (*replica.adapters,) if adapter not in replica.slots
    }
    memory_ms = [await app.first_token_ms(name) for name in names if f"{name}@1" in in_memory][: len(names) // 2]
    return {
        "cold_ms": spread(first_ms),
        "warm_ms": spread(repeated_ms),
        "memory_ms": spread(memory_ms),
        "more_ms": spread([cold_ms - warm_ms for cold_ms, warm_ms in zip(first_ms, repeated_ms, strict=True)]),
    }


async def promotion(app: App, folder: Path, times: int) -> dict[str, Any]:
    """Promote two versions in turn, each time with an immediate request, while other streams request the same name."""
    for number in (1, 2):
        app.registry.register_adapter("moving", write_adapter(folder / f"moving-{number}", 100 + number), base="bench")
    finished, failed, wrong_versions, answer_ms = asyncio.Event(), [], 0, []

    async def run_load() -> None:
        while not finished.is_set():
            failed.extend((await app.drive([["moving"]] * 4, 24))["failed"])

    load = asyncio.create_task(run_load())
    for number in range(times):
        version = f"moving@{1 + number % 2}"
        await asyncio.to_thread(app.registry.promote, version)
        start_time = time.perf_counter()
        wrong_versions += await answered_by(app, "moving") != version
        answer_ms.append(1000 * (time.perf_counter() - start_time))
    finished.set()
    await load
    return {"promotions": times, "wrong": wrong_versions, "failed": failed, "next_answer_ms": spread(answer_ms)}


async def answered_by(app: App, model: str) -> str:
    """The version that answers a short request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
    writer.write(app.request(model, 1))
    received = b""
    while b'"model":' not in received or b"[DONE]" not in received:
        data = await reader.read(65536)
        if not data:
            return received.decode(errors="replace")
        received += data
    writer.close()
    return received.split(b'"model":')[1].split(b'"')[1].decode()


async def zipf(
    app: App, names: Sequence[str], rounds: int, streams: int, requests: int, tokens: int, path: Path | None
) -> list[dict[str, Any]]:
    """Rounds of the same requests to the base and to adapters; round -1 warms up and is not counted."""
    dice, results = random.Random(0), Rounds(path)
    weights = [1 / rank for rank in range(1, len(names) + 1)]
    kinds: dict[str, Callable[[], list[str]]] = {
        "base": lambda: ["bench"] * requests,
        "warm": lambda: dice.choices(names[-SLOTS:], k=requests),
        "zipf": lambda: dice.choices(names, weights, k=requests),
    }
    for number in range(-1, rounds):
        order = [*kinds][number % 3 :] + [*kinds][: number % 3]
        for kind in order:
            requested = [kinds[kind]() for _ in range(streams)]
            loads_before = await count_adapter_loads(app)
            samples: list[list[Any]] = []
            watching = asyncio.create_task(watch(app, samples))
            figures = await app.drive(requested, tokens)
            watching.cancel()
            figures |= {
                "waiting": round(
                    statistics.mean(sum(r.waiting for r in sample) for sample in samples[1:] or samples), 2
                )
            }
            figures |= {
                "apart": round(statistics.mean(load_difference(sample) for sample in samples[1:] or samples), 2)
            }
            figures |= {
                "kind": kind,
                "round": number,
                "asked": len({name for stream_names in requested for name in stream_names}),
            }
            figures |= {
                "first_token_ms": spread(figures["first_token_ms"]),
                "loaded": await count_adapter_loads(app) - loads_before,
            }
            print(f"round {number} {kind:9} {figures['tokens_per_s']:7.0f} tokens/s, {figures['loaded']} loads, "
                  f"{figures['waiting']} waiting, {figures['apart']} requests more on one replica", flush=True)  # fmt: skip
            if number >= 0:
                results.append(figures)
    return results


async def watch(app: App, samples: list[list[Any]]) -> None:
    """Look at the replicas every half second."""
    while True:
        samples.append(await app.residency())
        await asyncio.sleep(0.5)


def load_difference(replicas: Sequence[Any]) -> int:
    """Difference in requests between the busiest replica and the least busy one."""
    return max(r.running + r.waiting for r in replicas) - min(r.running + r.waiting for r in replicas)


async def count_adapter_loads(app: App) -> int:
    """Number of adapter loads since the replicas started; they report it with each heartbeat."""
    await asyncio.sleep(1.2)
    return sum(replica.adapter_loads for replica in await app.residency())


async def training(app: App, cluster: Any, rounds: int) -> list[dict[str, Any]]:
    """Training jobs of a few steps; seconds from the last step to the first token of the new adapter, by phase."""
    from tandem.config import TrainConfig, from_dict
    from tandem.jobs.client import JobClient
    from tandem.jobs.prepare import prepare
    from tandem.sdk.datasets import build

    texts = app.home / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"say {n}, it is {n}"}) + "\n" for n in range(400)))
    build(str(texts), app.home / "data" / "texts", tokenizer=str(app.home.parent / "model"))
    client, results = JobClient(cluster), []
    for number in range(rounds):
        name = f"trained-{number}"
        job = prepare(
            from_dict(
                TrainConfig,
                {
                    "name": name, "data": {"path": "texts", "sequence_length": 64}, "model": {"base": "bench"},
                    "lora": {"rank": RANK}, "steps": 12, "batch_size": 4, "seed": number,
                },
            )
        )  # fmt: skip
        client.submit(job)
        while (figures := await adapter_figures(app, name, job)) is None:
            await asyncio.sleep(0.02)
        results.append(figures)
        print(f"training {number}: {figures['seconds']:.2f} s from the last step to the first token", flush=True)
        while job.last(Finished, Failed) is None:
            await asyncio.sleep(0.2)
    return results


async def adapter_figures(app: App, name: str, job: Any) -> dict[str, Any] | None:
    """The figures of a job once its adapter answered; None if it does not yet."""
    if (failed := job.last(Failed)) is not None:
        raise RuntimeError(failed.error)
    step = job.last(Step)
    if step is None or step.step < step.steps or step.time is None:
        return None
    try:
        first_token_ms = await app.first_token_ms(name)
    except RuntimeError:
        return None
    answered_at = time.time()
    registered_at = app.registry.resolve(name).created_at.timestamp()
    return {
        "seconds": answered_at - step.time,
        "to_registry_s": registered_at - step.time,
        "from_registry_s": answered_at - registered_at,
        "first_token_ms": first_token_ms,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile and most."""
    if not values:
        return {"median": math.nan, "p95": math.nan, "most": math.nan}
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 2),
        "p95": round(ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)) - 1)], 2),
        "most": round(ordered[-1], 2),
    }


def main() -> int:
    """Run it; 1 if a bar is missed and --check is given."""
    parser = options_parser(__doc__, smoke="few adapters, one short round")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--requests", type=int, default=8, help="of each stream in a round of zipf")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer in zipf")
    options = parser.parse_args()
    if options.smoke:
        options.adapters, options.rounds, options.streams, options.requests, options.tokens = 20, 1, 2, 2, 8
    results: dict[str, Any] = {
        "cpus": os.cpu_count(),
        "when": time.strftime("%Y-%m-%d"),
        "settings": dict(vars(options), json=None),
    }
    with tempfile.TemporaryDirectory(prefix="ta-", dir="/tmp") as temporary, serving(Path(temporary)) as (app, cluster):
        folder = Path(temporary) / "adapters"
        results["registering_s"] = register_many(app, folder, options.adapters)
        names = [f"adapter-{number:04}" for number in range(options.adapters)]
        measurements: dict[str, Callable[[], Any]] = {
            "cold": lambda: cold(app, names[-40:]),
            "promotion": lambda: promotion(app, folder, 40),
            "zipf": lambda: zipf(
                app, names, options.rounds, options.streams, options.requests, options.tokens, options.json
            ),
            "training": lambda: training(app, cluster, max(1, options.rounds // 2)),
        }
        for part in options.parts:
            results[part] = uvloop.run(measurements[part]())
            for row in PARTS[part](results[part]):
                print(f"{row[0]}: {row[1]}", flush=True)
    rows = [row for part in options.parts for row in PARTS[part](results[part])]
    verdicts = [row.pop() for row in rows]
    columns = ("what", "measured", "bar")
    show("Adapters", columns, rows)
    page = "# Adapters\n\nMade by `python -m bench.serving.adapters --json ...`: 2 replicas, 8 slots each, "
    page += f"{options.adapters} adapters registered in {results['registering_s']:.0f} s.\n\n{markdown_table(columns, rows)}\n\n"
    write(options.json, results, page + verdict_lines(v for v in verdicts if v) + "\n")
    return judge((v for v in verdicts if v), check=options.check)


def cold_rows(figures: dict[str, Any]) -> list[list[Any]]:
    """Rows of `cold`: description, measurement, bar, verdict."""
    difference = figures["more_ms"]
    labels = {"of an adapter from disk": "cold_ms", "of one in host memory": "memory_ms", "of one in a slot": "warm_ms"}
    rows: list[list[Any]] = [
        [
            f"first token {label}: median, 95th percentile",
            f"{figures[key]['median']:.1f}, {figures[key]['p95']:.1f} ms",
            "",
            None,
        ]
        for label, key in labels.items()
    ]
    message = f"first token of a cold adapter {difference['p95']:.0f} ms after a warm one's (95th percentile)"
    verdict = Verdict(difference["p95"] <= COLD_MS, COLD_MS / max(1e-9, difference["p95"]), message)
    measured_text = f"{difference['median']:.1f}, {difference['p95']:.1f} ms"
    return [*rows, ["cold, more than warm: median, 95th percentile", measured_text, "150 ms", verdict]]


def promotion_rows(figures: dict[str, Any]) -> list[list[Any]]:
    """Rows of `promotion`."""
    wrong, failed = figures["wrong"], len(figures["failed"])
    message = f"{figures['promotions']} promotions under load, {wrong} not seen by the next request, {failed} failed"
    verdict = Verdict(not wrong and not failed, float(not wrong and not failed), message)
    return [
        ["answer after a promotion, median", f"{figures['next_answer_ms']['median']:.0f} ms", "", None],
        ["requests after a promotion by another version; failed", f"{wrong}; {failed}", "0; 0", verdict],
    ]


def zipf_rows(rounds_figures: list[dict[str, Any]]) -> list[list[Any]]:
    """Rows of `zipf`: ratios are of each round's own two."""
    by_kind = {
        kind: {figures["round"]: figures for figures in rounds_figures if figures["kind"] == kind}
        for kind in ("base", "warm", "zipf")
    }
    ratios = {
        kind: [rounds[n]["tokens_per_s"] / by_kind["base"][n]["tokens_per_s"] for n in rounds]
        for kind, rounds in by_kind.items()
    }
    share, failed = statistics.median(ratios["zipf"]), sum(len(figures["failed"]) for figures in rounds_figures)
    rows: list[list[Any]] = []
    labels = {"base": "the base", "warm": "8 adapters that stay in their slots", "zipf": "1,000 adapters"}
    for kind, rounds in by_kind.items():
        speed = statistics.median(figures["tokens_per_s"] for figures in rounds.values())
        first = statistics.median(figures["first_token_ms"]["median"] for figures in rounds.values())
        measured_text = f"{speed:,.0f}, {first:.0f} ms, {statistics.median(ratios[kind]):.2f}"
        rows.append([f"{labels[kind]}: tokens/s, first token, share of the base", measured_text, "", None])
    rows.append(["loads in all rounds", str(sum(figures["loaded"] for figures in by_kind["zipf"].values())), "", None])
    message = f"adapters under Zipf traffic at {share:.2f} of base-only throughput, {failed} failed"
    verdict = Verdict(share >= SHARE and not failed, 0.0 if failed else share / SHARE, message)
    measured_text = f"{share:.2f} ({min(ratios['zipf']):.2f}, {max(ratios['zipf']):.2f})"
    return [*rows, ["adapters as a share of the base (least, most)", measured_text, "0.80", verdict]]


def training_rows(rounds: list[dict[str, Any]]) -> list[list[Any]]:
    """Rows of `training`."""
    seconds = statistics.median(figures["seconds"] for figures in rounds)
    registry = statistics.median(figures["to_registry_s"] for figures in rounds)
    message = f"{seconds:.2f} s from a run's last step to the first token of its adapter"
    verdict = Verdict(seconds <= TRAINED_S, TRAINED_S / seconds, message)
    return [
        ["last step to the registry", f"{registry:.2f} s", "", None],
        ["last step to the first token", f"{seconds:.2f} s", "2 s", verdict],
    ]


PARTS: dict[str, Callable[[Any], list[list[Any]]]] = {
    "cold": cold_rows,
    "promotion": promotion_rows,
    "zipf": zipf_rows,
    "training": training_rows,
}

if __name__ == "__main__":
    sys.exit(main())
