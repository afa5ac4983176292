"""A burst of real requests before a model that scales: replicas, waiting requests and rate over time, and what it took.

    python -m bench.serving.autoscale [--burst 100] [--json FILE] [--check] [--smoke]

One cluster, a tiny Llama on vLLM's CPU build with `SLOTS` sequences at once, none to two replicas. It sleeps; one request wakes
it and is held meanwhile; then `STREAMS` clients ask without a pause for `--burst` seconds; then nobody asks until it sleeps.
Whatever is not an answer of the right length is a failed request, of which there may be none, also a 503 that says when to come
back. `--smoke` takes echo engines that take two seconds to start.

The plot lies beside FILE, as .png. On two cores the engine that starts and the one that works share both: the second replica is
up later than it would be on a machine of its own, and the rate dips meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

from bench.harness import report
from bench.harness.machine import machine
from bench.harness.models import write_model
from bench.harness.options import options_parser
from bench.harness.report import Verdict
from bench.harness.servers import ENVIRONMENT, free_port

STREAMS, TOKENS, SLOTS = 16, 64, 4
MODEL, APP = "bench", "tandem"
PATIENCE_S, LOOK_S = 150.0, 0.25
SCALING = {
    "min_replicas": 0,
    "max_replicas": 2,
    "target_waiting": 2,
    "upscale_delay_s": 1.0,
    "downscale_delay_s": 8.0,
}


def main() -> int:
    """Measure; 1 if a bar is missed and --check is given."""
    parser = options_parser(__doc__, smoke="echo engines and a burst of 25 s")
    parser.add_argument("--burst", type=float, default=100.0, help="seconds")
    options = parser.parse_args()
    burst_s = min(options.burst, 25.0) if options.smoke else options.burst
    machine_info = machine()
    with tempfile.TemporaryDirectory(prefix="tb-", dir="/tmp") as folder, serving(Path(folder), options.smoke) as port:
        with Sampler(options.json) as sampler:
            load = asyncio.run(drive(port, burst_s, sampler))
    summary = summarise(load, sampler.samples)
    rows, results = [list(row) for row in cells(summary)], verdicts(summary)
    engine = "echo engines" if options.smoke else "vLLM on the CPU"
    title = f"{STREAMS} clients for {burst_s:g} s, {engine}, {SLOTS} sequences at once, none to two replicas"
    report.show(title, ("what", ""), rows)
    image = (options.json or Path("autoscale")).with_suffix(".png")
    if options.json:
        plot(sampler.samples, load, image, title)
    page = f"# Autoscaling\n\nMade by `python -m bench.serving.autoscale --json ...`. {title}.\n\n"
    page += f"{report.markdown_table(('what', ''), rows)}\n\n![Replicas, requests and rate over time]({image.name})"
    page += f"\n\n{report.verdict_lines(results)}\n"
    report.write(options.json, {"machine": machine_info, "summary": summary, **timeline(load, sampler.samples)}, page)
    return report.judge(results, check=options.check)


# ---- the served app --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(folder: Path, smoke: bool) -> Iterator[int]:
    """The app on a cluster of its own; its port."""
    os.environ.update(ENVIRONMENT, TANDEM_HOME=str(folder / "home"))
    from tandem.cluster.local import local_cluster

    if smoke:
        model = {"model": MODEL, "engine": "echo", "engine_args": {"delay_s": 0.01, "slots": SLOTS, "start_s": 2.0}}
    else:
        write_model(folder / "model")
        args = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": SLOTS}
        model = {"model": str(folder / "model"), "engine_args": args}
    with local_cluster(num_cpus=8) as cluster, contextlib.ExitStack() as exit_stack:
        import ray
        from ray import serve

        from tandem.apps.build import prepare
        from tandem.apps.deploy import deploy
        from tandem.config import ServeConfig, from_dict

        ray.init(address=cluster.address, namespace="tandem", log_to_driver=False, logging_level=logging.ERROR)
        exit_stack.callback(ray.shutdown)
        port = free_port()
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        model_values = {**model, "name": MODEL, "max_adapters": 0, "autoscaling": SCALING, "hold_s": PATIENCE_S}
        deploy(prepare(from_dict(ServeConfig, {"app": APP, "models": [model_values]}), check=False))
        yield port


class Sampler:
    """Samples the app's state four times a second, in a thread, for the length of a `with` block."""

    def __init__(self, path: Path | None) -> None:
        self.samples = report.Rounds(path)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(20)

    def __call__(self) -> dict[str, float]:
        """The newest sample."""
        return self.samples[-1] if self.samples else {"ready": 0, "wanted": 0}

    def _run(self) -> None:
        from ray import serve

        directory = serve.get_deployment_handle("Directory", APP)
        while not self._stop.wait(LOOK_S):
            with contextlib.suppress(Exception):  # what Serve is about to replace may not answer
                replicas = directory.watch.remote(0).result(timeout_s=5).replicas
                states = serve.status().applications[APP].deployments[f"engine-{MODEL}"].replica_states
                ready = [r for r in replicas if r.state == "ready"]
                running_counts = [
                    count for state, count in states.items() if getattr(state, "value", state) != "STOPPING"
                ]
                self.samples.append(
                    {
                        "at": time.time(),
                        "ready": len(ready),
                        "wanted": sum(running_counts),
                        "running": sum(r.running for r in replicas),
                        "waiting": sum(r.waiting for r in replicas),
                    }
                )


# ---- the load -------------------------------------------------------------------------------------------------------


async def drive(port: int, burst_s: float, sampler: Sampler) -> dict[str, Any]:
    """A sleeping model, one request, a burst, and quiet until it sleeps again."""
    answers: list[dict[str, Any]] = []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=PATIENCE_S)) as session:

        async def send_one() -> None:
            answers.append(await send_request(session, f"http://127.0.0.1:{port}/v1/completions"))

        async def client(until: float) -> None:
            while time.time() < until:
                await send_one()

        await asyncio.sleep(3)
        marks = {"began": time.time(), "slept": sampler()["ready"]}
        await send_one()
        marks["burst"] = time.time()
        await asyncio.gather(*(client(marks["burst"] + burst_s) for _ in range(STREAMS)))
        marks["quiet"] = time.time()
        deadline = marks["quiet"] + PATIENCE_S / 2
        while (sampler()["wanted"] or sampler()["ready"]) and time.time() < deadline:
            await asyncio.sleep(LOOK_S)
        marks["ended"] = time.time()
        await asyncio.sleep(1)
    return {**marks, "answers": answers}


async def send_request(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """One request."""
    body = {"model": MODEL, "prompt": "word " * TOKENS, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    start_time, error = time.time(), ""
    try:
        async with session.post(url, json=body) as response:
            if response.status != 200:
                error = f"{response.status}: {(await response.text())[:200]}"
            elif (tokens := (await response.json())["usage"]["completion_tokens"]) != TOKENS:
                error = f"{tokens} tokens"
    except (aiohttp.ClientError, TimeoutError, OSError) as exception:
        error = repr(exception)
    return {"began": start_time, "ended": time.time(), "failed": error}


# ---- results ---------------------------------------------------------------------------------------------------------


def summarise(load: dict[str, Any], samples: list[dict[str, float]]) -> dict[str, Any]:
    """Seconds from one event to the next, and rates."""
    first, answers = load["answers"][0], load["answers"]

    def since(mark: str, key: str, condition: Any) -> float | None:
        seconds = [
            sample["at"] - load[mark] for sample in samples if sample["at"] >= load[mark] and condition(sample[key])
        ]
        return round(seconds[0], 1) if seconds else None

    second = since("burst", "ready", lambda count: count >= 2)
    second_ready_at = load["burst"] + (second if second is not None else load["quiet"])
    return {
        "slept": load["slept"] == 0,
        "woke_s": round(first["ended"] - first["began"], 1),
        "wanted_s": since("burst", "wanted", lambda count: count >= 2),
        "second_s": second,
        "rate_one": rate(answers, load["burst"], min(second_ready_at, load["quiet"])),
        "rate_two": rate(answers, second_ready_at, load["quiet"]),
        "one_s": since("quiet", "ready", lambda count: count <= 1),
        "none_s": since("quiet", "ready", lambda count: count == 0),
        "answers": len(answers),
        "failed": [sample["failed"] for sample in answers if sample["failed"]],
        "most": max(sample["ready"] for sample in samples),
    }


def rate(answers: list[dict[str, Any]], start: float, end: float) -> float | None:
    """Answers a second between two moments."""
    count = sum(start <= answer["ended"] < end and not answer["failed"] for answer in answers)
    return round(count / (end - start), 2) if end - start > 1 else None


def timeline(load: dict[str, Any], samples: list[dict[str, float]]) -> dict[str, Any]:
    """Timeline in seconds since the first request: each observed change of replicas, and the answers of each second."""
    start = load["began"]
    relative_samples = [{**item, "at": round(item["at"] - start, 2)} for item in samples]
    changed_samples = [
        current
        for previous, current in itertools.pairwise(relative_samples)
        if {**previous, "at": 0} != {**current, "at": 0}
    ]
    answers_by_second = Counter(int(item["ended"] - start) for item in load["answers"])
    marks = {key: round(load[key] - start, 2) for key in ("burst", "quiet", "ended")}
    return {
        "marks": marks,
        "samples": [*relative_samples[:1], *changed_samples],
        "answers": [answers_by_second[second] for second in range(max(answers_by_second) + 1)],
    }


def cells(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The table."""
    names = {
        "woke_s": "from a request to a sleeping model to its answer, s",
        "wanted_s": "from the burst to the decision for a second replica, s",
        "second_s": "from the burst to the second replica's readiness, s",
        "rate_one": "answers/s before that",
        "rate_two": "answers/s after it",
        "one_s": "from the burst's end to one replica, s",
        "none_s": "from the burst's end to none, s",
        "answers": "requests",
    }
    yield from ((name, "-" if summary[key] is None else str(summary[key])) for key, name in names.items())
    yield "failed requests", str(len(summary["failed"]))


def verdicts(summary: dict[str, Any]) -> list[Verdict]:
    """No failed request, and the whole way up and down."""
    failed = summary["failed"]
    scaled_both_ways = summary["slept"] and summary["most"] == SCALING["max_replicas"] and summary["none_s"] is not None
    return [
        Verdict(scaled_both_ways, float(scaled_both_ways), "from none to two replicas and back to none"),
        Verdict(
            not failed,
            float(not failed),
            f"{len(failed)} failed requests (bar 0){': ' if failed else ''}{'; '.join(failed[:2])}",
        ),
    ]


def plot(samples: list[dict[str, float]], load: dict[str, Any], path: Path, title: str) -> None:
    """Replicas, requests and rate over time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    start = load["began"]
    sample_s = [item["at"] - start for item in samples]
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    replicas_axis, requests_axis, rate_axis = figure.subplots(3, 1, sharex=True)
    replicas_axis.set_title(title, loc="left", fontsize=10)
    replicas_axis.step(sample_s, [item["wanted"] for item in samples], where="post", color="#888888", label="asked for")
    replicas_axis.step(
        sample_s, [item["ready"] for item in samples], where="post", color="#1f5fa8", linewidth=2, label="ready"
    )
    replicas_axis.set_ylabel("replicas")
    requests_axis.plot(sample_s, [item["waiting"] for item in samples], color="#c8690e", label="waiting")
    requests_axis.plot(sample_s, [item["running"] for item in samples], color="#2e7d4f", label="running")
    requests_axis.set_ylabel("requests in engines")
    ended_s = sorted(item["ended"] - start for item in load["answers"])
    seconds = range(int(sample_s[-1]) + 1)
    rates = [sum(second - 2 <= item < second + 3 for item in ended_s) / 5 for second in seconds]
    rate_axis.plot(seconds, rates, color="#2e7d4f")
    rate_axis.set_ylabel("answers/s (5 s)")
    rate_axis.set_xlabel("seconds")
    for axis in (replicas_axis, requests_axis, rate_axis):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.axvspan(load["burst"] - start, load["quiet"] - start, color="#888888", alpha=0.1, label="burst")
        axis.set_ylim(bottom=0)
        if axis is not rate_axis:
            axis.legend(frameon=False, loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    raise SystemExit(main())
