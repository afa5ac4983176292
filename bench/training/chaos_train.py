"""Cost of faults in a training job, and their effect on its result: the same job with and without faults.

    python -m bench.training.chaos_train [--seed N] [--steps 200] [--every 20] [--smoke] [--json FILE] [--check]

Every `--every` steps one fault is injected into the second job: a worker killed (SIGKILL), stopped (SIGSTOP) or told to end
(SIGTERM), its node killed, Ray Train's controller killed, the driver killed, the folder of the checkpoints unavailable for some
seconds. Each kind is equally frequent, in an order drawn by the seed. Nothing waits for a checkpoint before a fault. Both are
jobs of two workers with FSDP2 on a Ray cluster of their own, submitted as users submit them, with asynchronous saves, the
default. Printed are, for each fault, the steps that were computed twice and the seconds without a new step, and the last losses.

`--check` exits 1 unless the last losses are the same within 1e-5, every step was reported, and no fault had more steps computed
again than an interval of checkpoints and the steps during which one is written:
    repeated <= every_steps + ceil(write_s / step_s) + 1
where write_s is the longest time from a step to its checkpoint's commit in the undisturbed job, step_s its median step time, and
1 the step in progress.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness import report
from bench.harness.nodes import Node
from bench.harness.options import options_parser
from bench.harness.report import Verdict

LOSS_BAR = 1e-5
AWAY_S = 5.0
CHECKPOINT_EVERY = 10
FAULTS = (
    "worker killed", "node killed", "storage away", "worker told to end", "worker stopped", "controller killed", "driver killed",
)  # fmt: skip
SLOTS = {"training_slot": 2}
"""Resources of a node that holds both workers; there are two such nodes, so that a job goes on when one is lost."""
SHAPE = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 128,
    "max_length": 128,
}


def main() -> int:
    parser = options_parser(__doc__, smoke="two faults only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps between faults")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.every = 60, 20
    results = measure(options)
    print(page(results))
    report.write(options.json, results, page(results))
    return report.judge(verdicts(results), check=options.check)


# ---- the measurement ------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run both jobs; each on a cluster that nothing else uses."""
    from tandem import settings as environment
    from tandem.cluster.local import LocalCluster, authentication

    folder = Path(tempfile.mkdtemp(prefix="tandem-chaos-"))
    environment.export({"TANDEM_HOME": str(folder), "OMP_NUM_THREADS": "1", **authentication()}, override=True)
    cluster = LocalCluster.start(num_cpus=8)
    try:
        nodes = [Node(cluster, 2, resources=SLOTS) for _ in range(2)]
        for node in nodes:
            node.start()
        prepare(folder)
        calm = run(folder, "calm", options.steps, cluster, None)
        chaos = run(folder, "chaos", options.steps, cluster, Chaos(options, cluster, nodes))
        return {
            "seed": options.seed, "steps": options.steps, "every": options.every, "checkpoint_every": CHECKPOINT_EVERY,
            "cores": os.cpu_count(), "calm": calm, "chaos": chaos,
        }  # fmt: skip
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def prepare(folder: Path) -> None:
    """The dataset."""
    from tandem.data.build import build_dataset

    text_file = folder / "text.txt"
    text_file.write_text(
        "".join(f"Line {n}: {n * n} is {n} times {n}, and {n * 7 % 13} is left.\n\n" for n in range(4000))
    )
    build_dataset(str(text_file), folder / "data" / "text", vocab_size=512)


def run(home_folder: Path, name: str, steps: int, cluster: Any, chaos: Chaos | None) -> dict[str, Any]:
    """Submit the job and follow it; returns figures from its journal."""
    import yaml

    from tandem.jobs.client import JobClient
    from tandem.jobs.folder import JobFolder

    job = JobFolder(home_folder / "jobs" / name)
    job.path.mkdir(parents=True)
    config = {
        "name": name, "data": {"path": str(home_folder / "data" / "text"), "sequence_length": 128}, "model": SHAPE,
        "parallel": {"workers": 2, "resources_per_worker": {"training_slot": 1}},
        "steps": steps, "batch_size": 24, "register": False,
        "optimizer": {"learning_rate": 3e-3},
        "checkpoint": {"every_steps": CHECKPOINT_EVERY, "keep": 2},
        # A worker that is told to end has left before the next fault: signs are frequent, and steps long enough.
        "faults": {"heartbeat_s": 0.25, "hang_after_s": 10.0},
    }  # fmt: skip
    (job.path / "config.yaml").write_text(yaml.safe_dump(config))
    start_time = time.monotonic()
    client = JobClient(cluster)
    submission = client.submit(job)
    if chaos is not None:
        chaos.begin(job)
    lines = list(client.follow_resubmitted(job, submission))
    if chaos is not None:
        chaos.end()
    seconds = time.monotonic() - start_time
    events = job.events()
    if not events or events[-1]["event"] != "finished":
        print("\n".join(lines[-60:]), file=sys.stderr)
        raise SystemExit(f"The job {name} did not finish: {events[-1] if events else 'no events'}")
    step_events = [e for e in events if e["event"] == "step"]
    losses = {e["step"]: e["loss"] for e in step_events}
    return {
        "seconds": seconds, "reported": len(losses), "twice": len(step_events) - len(losses),
        "last_loss": losses[max(losses)], "losses": [losses[step] for step in sorted(losses)],
        "step_s": statistics.median(b["time"] - a["time"] for a, b in itertools.pairwise(step_events)),
        "write_s": write_s(events), "faults": repeated_work(events, chaos.done if chaos else []),
        "events": [e["event"] for e in events if e["event"] != "step"],
    }  # fmt: skip


def write_s(events: list[dict[str, Any]]) -> float:
    """The longest time from a step to the commit of its checkpoint."""
    step_times = {e["step"]: e["time"] for e in events if e["event"] == "step"}
    return max(
        (e["time"] - step_times[e["step"]] for e in events if e["event"] == "checkpoint" and e["step"] in step_times),
        default=0.0,
    )


def repeated_work(events: list[dict[str, Any]], faults: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each fault, the steps that were computed twice, and the seconds until the first new one."""
    results = []
    for number, fault in enumerate(faults):
        until = faults[number + 1]["time"] if number + 1 < len(faults) else float("inf")
        earlier_steps = [e for e in events if e["event"] == "step" and e["time"] <= fault["time"]]
        reached = max(e["step"] for e in earlier_steps)
        steps = [e for e in events if e["event"] == "step" and fault["time"] < e["time"] <= until]
        # What went on before the fault told is no repetition.
        computed_steps, repeated_steps = {e["step"] for e in earlier_steps}, 0
        highest, last_new, longest_gap_s = reached, earlier_steps[-1]["time"], 0.0
        for step in steps:
            repeated_steps += step["step"] in computed_steps
            computed_steps.add(step["step"])
            if step["step"] > highest:
                longest_gap_s = max(longest_gap_s, step["time"] - last_new)
                highest, last_new = step["step"], step["time"]
        results.append({"fault": fault["fault"], "step": reached, "twice": repeated_steps, "lost_s": longest_gap_s})
    return results


class Chaos:
    """Does a fault every so many steps, in a thread of its own."""

    def __init__(self, options: argparse.Namespace, cluster: Any, nodes: list[Node]) -> None:
        draw = random.Random(options.seed)
        steps = range(options.every, options.steps, options.every)
        kinds = [kind for _ in range(-(-len(steps) // len(FAULTS))) for kind in draw.sample(FAULTS, len(FAULTS))]
        self._plan = [(step, kind, draw.random()) for step, kind in zip(steps, kinds, strict=False)]
        self._cluster, self._nodes = cluster, nodes
        self.done = report.Rounds(options.json)
        self._stopped = threading.Event()

    def begin(self, job: Any) -> None:
        """Start with a job that was submitted."""
        self._thread = threading.Thread(target=self._run, args=(job,), daemon=True)
        self._thread.start()

    def end(self) -> None:
        """The job is over."""
        self._stopped.set()
        self._thread.join()

    def _run(self, job: Any) -> None:
        for step, fault, share in self._plan:
            # Somewhere between two checkpoints.
            at = step + int(share * CHECKPOINT_EVERY)
            while not reached(job.events(), at):
                if self._stopped.wait(0.1):
                    return
            self.done.append({"fault": fault, "time": time.time()})
            print(f"step {at}: {fault}", file=sys.stderr, flush=True)
            self._do(fault, share, job)

    def _do(self, fault: str, share: float, job: Any) -> None:
        if fault == "storage away":
            checkpoints, moved = job.path / "checkpoints", job.path / "away"
            checkpoints.rename(moved)
            checkpoints.symlink_to("/nowhere/that/is")
            self._stopped.wait(AWAY_S)
            checkpoints.unlink()
            moved.rename(checkpoints)
            return
        if fault == "node killed":
            (worker, *_) = wait_for(lambda: self._actors("RayTrainWorker"))
            node = next(node for node in self._nodes if worker in {process.pid for process in node.processes()})
            node.kill()
            node.start()
            return
        number, find = {
            "worker killed": (signal.SIGKILL, lambda: self._actors("RayTrainWorker")),
            "worker stopped": (signal.SIGSTOP, lambda: self._actors("RayTrainWorker")),
            "worker told to end": (signal.SIGTERM, lambda: self._actors("RayTrainWorker")),
            "controller killed": (signal.SIGKILL, lambda: self._actors("TrainController")),
            "driver killed": (signal.SIGKILL, lambda: drivers(job.path)),
        }[fault]
        pids = wait_for(find)
        os.kill(pids[int(share * len(pids))], number)

    def _actors(self, name: str) -> list[int]:
        from ray.util.state import list_actors

        actors = list_actors(
            address=self._cluster.dashboard_url, filters=[("class_name", "=", name), ("state", "=", "ALIVE")]
        )
        return sorted(actor.pid for actor in actors if actor.pid)


def reached(events: list[dict[str, Any]], at: int) -> bool:
    """Whether a run has come to a step."""
    return max((e["step"] for e in events if e["event"] == "step"), default=0) >= at


def wait_for(find_pids: Callable[[], list[int]]) -> list[int]:
    while not (pids := find_pids()):
        time.sleep(0.2)
    return pids


def drivers(job: Path) -> list[int]:
    """The job's driver."""
    import psutil

    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if {"tandem.train.launch", str(job)} <= set(process.info["cmdline"] or [])
    ]


# ---- results ---------------------------------------------------------------------------------------------------------


def verdicts(results: dict[str, Any]) -> list[Verdict]:
    """The figures that have a bar, with their verdicts."""
    calm, chaos = results["calm"], results["chaos"]
    loss_difference = abs(calm["last_loss"] - chaos["last_loss"])
    max_repeated = max((f["twice"] for f in chaos["faults"]), default=0)
    faults_planned = len(range(results["every"], results["steps"], results["every"]))
    faults_done, reported = len(chaos["faults"]), chaos["reported"]
    max_allowed = results["checkpoint_every"] + math.ceil(calm["write_s"] / calm["step_s"]) + 1
    return [
        Verdict(
            loss_difference <= LOSS_BAR,
            LOSS_BAR / max(loss_difference, 1e-12),
            f"the last losses are {loss_difference:.1e} apart; the bar is {LOSS_BAR:.0e}",
        ),
        Verdict(
            reported == results["steps"],
            reported / results["steps"],
            f"{reported} of {results['steps']} steps were reported",
        ),
        Verdict(
            faults_done == faults_planned,
            faults_done / faults_planned,
            f"{faults_done} of {faults_planned} faults were done",
        ),
        Verdict(
            max_repeated <= max_allowed,
            max_allowed / max(max_repeated, 1),
            f"at most {max_repeated} steps were computed again after a fault; the bar is {max_allowed}: an interval of "
            f"{results['checkpoint_every']}, {calm['write_s']:.2f} s for a write at {calm['step_s']:.2f} s a step, and 1",
        ),
    ]


def page(results: dict[str, Any]) -> str:
    """The result for a page."""
    calm, chaos = results["calm"], results["chaos"]
    setup = (
        f"{results['cores']} cores, 2 workers, {results['steps']} steps, a checkpoint every {results['checkpoint_every']}, "
        f"a fault every {results['every']}, seed {results['seed']}."
    )
    comparison = (
        f"Left alone: {calm['seconds']:.0f} s, last loss {calm['last_loss']:.6f}. With faults: {chaos['seconds']:.0f} s, last "
        f"loss {chaos['last_loss']:.6f}; {chaos['twice']} steps computed twice, {chaos['seconds'] - calm['seconds']:.0f} s lost."
    )
    columns = ("fault", "at step", "computed twice", "seconds without a new step")
    rows = [(f["fault"], str(f["step"]), str(f["twice"]), f"{f['lost_s']:.1f}") for f in chaos["faults"]]
    parts = (
        "# Faults during training",
        setup,
        report.markdown_table(columns, rows),
        comparison,
        report.verdict_lines(verdicts(results)),
    )
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
