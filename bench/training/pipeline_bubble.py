"""The pipeline's bubble, measured against its formula, for every schedule and several counts of micro-batches.

    python -m bench.training.pipeline_bubble [--smoke] [--rounds N] [--micro-batches M ...] [--json FILE] [--check]

The bubble is the share of a step that ranks do not compute in. Two gloo processes hold a stage (or two parts) each of a Llama
whose layers are all alike and whose vocabulary is too small to weigh; Tandem's own `place` and `Pipeline.step` run it. Each rank
adds up the time inside its stages' forward, backward and weight passes and inside the loss; a step lasts from the first
rank's start to the last rank's end, on the clock that all processes of a machine share. bubble = 1 - busy / (ranks x step).

Why so, and not by a line through step times over m: both halves of the ratio are of one step, so a machine that is slower for a
second is slower in both, while a line needs steps of different m to meet the same machine. What is not computing (sending, the
schedule's own Python) counts as bubble: the measure can only be too high. Micro-batches are large enough that this is a
few hundredths. Medians are over the steps of alternating rounds.

Formulas, with p ranks, m micro-batches, v parts a rank: gpipe and 1f1b (p-1)/(m+p-1) (Huang et al. 2019); interleaved
(p-1)/(vm+p-1) (Narayanan et al. 2021); zero_bubble (p-1)/(3vm+p-1): with forward, input and weight passes of equal length only
the way of the first micro-batch down the ranks is left (Qi et al. 2024). Passes are not of equal length, and torch leaves all
of the first stage's backward to its weight pass; so the last column tells how long a step takes beside 1f1b's, too.

`--check` exits 1, and prints the worst figure last, where a bubble is more than 0.05 above its formula.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness import report
from bench.harness.options import options_parser
from bench.harness.report import Verdict

TOLERANCE = 0.05
RANKS = 2
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")
STEPS = 2
"""Steps of a cell in a round."""
LAYERS, WIDTH, VOCABULARY, ROWS, LENGTH = 8, 384, 64, 2, 128
"""The model, and the rows and tokens of a micro-batch: about 0.15 s of a core for each rank, against 0.4 MB to send."""


def main() -> int:
    parser = options_parser(
        __doc__, smoke="one round of 4 micro-batches", check=f"exit 1 where a bubble is {TOLERANCE} above its formula"
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.micro_batches = 1, [4]
    if options.rank is not None:
        steps = measure(options.rounds, options.micro_batches, options.json if options.rank == 0 else None)
        print(json.dumps(steps), flush=True)
        # Threads of gloo that are still there when the interpreter ends abort the process now and then.
        os._exit(0)
    load = os.getloadavg()[0]
    results = {"load_before": load, "cores": os.cpu_count(), "ranks": RANKS, "rounds": options.rounds}
    results["cells"] = summary(world())
    report.show(title(results), COLUMNS, cells_of(results), width=110)
    report.write(options.json, results, markdown(results))
    return report.judge(verdicts(results), check=options.check)


def formula(schedule: str, ranks: int, micro_batches: int) -> float:
    """The share of a step that ranks are idle in, by the schedule's paper."""
    passes = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 6}[schedule] * micro_batches
    return (ranks - 1) / (passes + ranks - 1)


# ---- the measurement ------------------------------------------------------------------------------------------------


def world() -> list[dict[str, Any]]:
    """The measurements of rank 0, from processes started with the options of this one."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    common = {
        "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.training.pipeline_bubble", *sys.argv[1:], "--rank", str(rank)],
            env={**os.environ, **common, "RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        output = processes[0].communicate(timeout=900)[0]
        statuses = [process.wait(60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(statuses):
        raise SystemExit(f"The ranks ended with {statuses}; what they said is above.")
    steps: list[dict[str, Any]] = json.loads(output.splitlines()[-1])
    return steps


def measure(rounds: int, micro_batches: list[int], path: Path | None) -> list[dict[str, Any]]:
    """One rank: every cell `rounds` times, in alternation; {schedule, micro_batches, step_s, bubble} of each step."""
    import torch
    import torch.distributed as dist

    from tandem.train.parallel.mesh import Degrees

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = Degrees(pp=RANKS).mesh("cpu", RANKS)
    cells = [Cell(schedule, count, mesh) for count in micro_batches for schedule in SCHEDULES]
    for cell in cells:
        cell.step()  # finds out about shapes
    steps = report.Rounds(path)
    for _ in range(rounds):
        for cell in cells:
            for _ in range(STEPS):
                steps.append({"schedule": cell.schedule, "micro_batches": cell.count, **cell.step()})
    dist.barrier()
    dist.destroy_process_group()
    return steps


class Cell:
    """A parallel model with one schedule, whose stages are timed."""

    def __init__(self, schedule: str, count: int, mesh: Any) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from tandem.config import DataConfig, ModelConfig, ParallelismConfig, TrainConfig
        from tandem.train.parallel.parallelize import parallelize

        self.schedule, self.count, self._busy = schedule, count, 0.0
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=WIDTH * 8 // 3, num_hidden_layers=LAYERS,
                num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False,
            )
        )  # fmt: skip
        config = TrainConfig(
            name="bubble",
            data=DataConfig(path="x", sequence_length=LENGTH),
            model=ModelConfig(),
            parallel=ParallelismConfig(workers=RANKS, pipeline=RANKS, schedule=schedule),
            batch_size=ROWS * count,
            accumulate=count,
        )
        self._model = parallelize(model, mesh, config, torch.device("cpu"))
        assert self._model.pipeline is not None
        self._pipeline = self._model.pipeline
        pipeline_schedule = self._pipeline.schedule
        for stage in getattr(pipeline_schedule, "_stages", None) or [pipeline_schedule._stage]:
            for name in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
                setattr(stage, name, self._timed(getattr(stage, name)))
        self._loss = self._timed(summed_loss)
        ids = torch.randint(VOCABULARY, (ROWS * count, LENGTH))
        self._rows = torch.stack([ids, ids, torch.arange(LENGTH).expand_as(ids)], 1)

    def step(self) -> dict[str, float]:
        """One step: its seconds, and the share of them that ranks did not compute in."""
        import torch
        import torch.distributed as dist

        self._busy = 0.0
        dist.barrier()
        start_time = time.perf_counter()
        self._pipeline.step(self._rows, self._loss)
        own_times = torch.tensor([start_time, time.perf_counter(), self._busy], dtype=torch.float64)
        self._model.zero_grad()
        times_by_rank = [torch.empty_like(own_times) for _ in range(RANKS)]
        dist.all_gather(times_by_rank, own_times)
        start_times, end_times, busy = torch.stack(times_by_rank).unbind(1)
        step_s = float(end_times.max() - start_times.min())
        return {"step_s": step_s, "bubble": 1 - float(busy.sum()) / (RANKS * step_s)}

    def _timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start_time = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self._busy += time.perf_counter() - start_time

        return timed


def summed_loss(logits: Any, labels: Any) -> Any:
    """Cross-entropy of each token with itself: only the duration matters here."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits.flatten(0, 1), labels.flatten())


# ---- results ---------------------------------------------------------------------------------------------------------


def summary(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians of each cell's steps, in the order of the first."""
    cells: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for step in steps:
        cells.setdefault((step["schedule"], step["micro_batches"]), []).append(step)
    times = {key: statistics.median(step["step_s"] for step in steps_of_cell) for key, steps_of_cell in cells.items()}
    return [
        {
            "schedule": schedule, "micro_batches": count, "formula": formula(schedule, RANKS, count),
            "bubble": statistics.median(step["bubble"] for step in steps_of_cell),
            "least": min(step["bubble"] for step in steps_of_cell), "most": max(step["bubble"] for step in steps_of_cell),
            "step_s": times[schedule, count], "of_1f1b": times[schedule, count] / times["1f1b", count],
        }
        for (schedule, count), steps_of_cell in cells.items()
    ]  # fmt: skip


COLUMNS = ("schedule", "micro-batches", "formula", "bubble (least-most)", "step", "of 1f1b's")


def cells_of(results: dict[str, Any]) -> list[list[str]]:
    """The rows of the table."""
    return [
        [
            c["schedule"], str(c["micro_batches"]), f"{c['formula']:.3f}",
            f"{c['bubble']:.3f} ({c['least']:.3f}-{c['most']:.3f})", f"{c['step_s']:.2f} s", f"{c['of_1f1b']:.2f}",
        ]
        for c in results["cells"]
    ]  # fmt: skip


def title(results: dict[str, Any]) -> str:
    """Title of the table: workload and machine."""
    return (
        f"Bubble of {RANKS} pipeline ranks on {results['cores']} cores, gloo, micro-batches of {ROWS} x {LENGTH} tokens, "
        f"medians of {results['rounds'] * STEPS} steps"
    )


def verdicts(results: dict[str, Any]) -> list[Verdict]:
    """The figures that have a bar, with their verdicts."""
    verdict_list = []
    for cell in results["cells"]:
        excess = cell["bubble"] - cell["formula"]
        message = (
            f"{cell['schedule']}, {cell['micro_batches']} micro-batches: {cell['bubble']:.3f}, {excess:+.3f} of the formula's "
            f"{cell['formula']:.3f}; the bar is +{TOLERANCE}"
        )
        verdict_list.append(Verdict(excess <= TOLERANCE, (TOLERANCE - excess) / TOLERANCE, message))
    return verdict_list


def markdown(results: dict[str, Any]) -> str:
    """The result for a page."""
    table = report.markdown_table(COLUMNS, cells_of(results))
    return f"# The pipeline's bubble\n\n{title(results)}.\n\n{table}\n\n{report.verdict_lines(verdicts(results))}\n"


if __name__ == "__main__":
    sys.exit(main())
