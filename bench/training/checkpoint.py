"""Cost of a checkpoint in a training run: synchronous and asynchronous saves, and their speed against the disk's.

    python -m bench.training.checkpoint [--workers N] [--rounds N] [--folder PATH] [--json FILE] [--check] [--smoke]

A model of 63 million parameters (its state is 0.76 GB: weights and both moments of AdamW, float32) is trained by Tandem's own
step under FSDP2 on gloo. A round is some steps without a save, as many with a synchronous save before them, and as many with an
asynchronous one; figures are medians over the rounds.

    stopped      seconds that `save` keeps the training loop waiting
    slowed       seconds that the steps after it take longer than steps without a save, until the checkpoint is whole
    to whole     seconds from the call to the commit
    written      bytes of the checkpoint's files, by `to whole`
    disk         bytes of plain files of the same size, written and synced by as many processes at once, by their time

`--check` exits 1 unless the asynchronous stop is at most a tenth of the synchronous one.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.harness import report
from bench.harness.options import options_parser
from bench.harness.report import Verdict
from bench.harness.servers import ROOT

BAR = 0.1
STEPS, ROWS, LENGTH, VOCABULARY = 6, 1, 128, 8192
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 768, "num_hidden_layers": 8, "num_attention_heads": 12,
    "num_key_value_heads": 12, "intermediate_size": 2048, "max_position_embeddings": LENGTH, "tie_word_embeddings": True,
}  # fmt: skip
QUICK = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def main() -> int:
    """Run the world and print the table; 1 if the bar is missed and --check is given."""
    parser = options_parser(
        __doc__, smoke="a small model", check=f"exit 1 if the stop is above {BAR:.0%}% of a synchronous one"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written: on the disk to measure")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        shape = {**SHAPE, **QUICK} if options.smoke else SHAPE
        measure(options, shape)
        return 0
    load = os.getloadavg()[0]
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        figures = world(folder, options.workers, options.rounds, options.smoke, options.json) | {
            "load_before": load,
            "cores": os.cpu_count(),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report.show(title(figures), COLUMNS, rows_of(figures))
    report.write(options.json, figures, markdown(figures))
    return report.judge([verdict(figures)], check=options.check)


def world(folder: Path, workers: int, rounds: int, smoke: bool, path: Path | None) -> dict[str, Any]:
    """The figures of rank 0."""
    command = [
        sys.executable,
        "-m",
        "bench.training.checkpoint",
        "--workers",
        str(workers),
        "--rounds",
        str(rounds),
        "--folder",
        str(folder),
    ]
    command += ["--smoke"] if smoke else []
    command += ["--json", str(path)] if path else []
    running = [
        subprocess.Popen([*command, "--rank", str(rank)], env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT)
        for rank in range(workers)
    ]
    try:
        for process in running:
            if process.wait(1800) != 0:
                raise SystemExit("A rank ended with an error: see above.")
    finally:
        for process in running:
            process.kill()
    figures: dict[str, Any] = json.loads((folder / "figures.json").read_text())
    return figures


def measure(options: argparse.Namespace, shape: dict[str, Any]) -> None:
    """One rank: trains, saves and measures times; rank 0 writes the figures."""
    import torch
    import torch.distributed as dist

    from tandem.checkpoint import folders
    from tandem.checkpoint.folders import SavedState
    from tandem.checkpoint.sharded import Checkpoints

    rank, workers, rounds, folder = options.rank, options.workers, options.rounds, options.folder
    log = report.Rounds(options.json if rank == 0 else None)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=workers)
    model, optimizer, step = build(workers, shape)
    kinds = {
        kind: Checkpoints(folder / kind, keep=1, asynchronous=kind == "asynchronous")
        for kind in ("synchronous", "asynchronous")
    }
    saves: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    plain: list[float] = []
    step()
    for number in range(rounds + 1):  # the first round only warms up
        dist.barrier()
        start_time = time.perf_counter()
        for _ in range(STEPS):
            step()
        plain_step_s = (time.perf_counter() - start_time) / STEPS
        for kind, checkpoints in kinds.items():
            commit_times: list[float] = []
            os.sync()
            dist.barrier()
            start_time = time.perf_counter()
            state = SavedState(step=number, tokens=0, loss=None, world=workers)
            checkpoints.save(model, optimizer, state, on_commit=functools.partial(record_time, commit_times))
            stopped_s = time.perf_counter() - start_time
            steps_taken = 0
            steps_start = time.perf_counter()
            # As long as it is being written, and all ranks as often.
            while steps_taken < STEPS or not broadcast_flag(bool(commit_times)):
                step()
                steps_taken += 1
            slowed_s = time.perf_counter() - steps_start - steps_taken * plain_step_s
            checkpoints.wait()
            size = sum(f.stat().st_size for f in folders.latest(folder / kind).iterdir())
            # Rank 0 writes the figures, and is the one that is told of a commit.
            if number and rank == 0:
                saves[kind].append(
                    {
                        "stopped": stopped_s,
                        "slowed": slowed_s,
                        "to whole": commit_times[0] - start_time,
                        "bytes": float(size),
                    }
                )
        if number:
            plain.append(plain_step_s)
            log.append(
                {
                    "step": plain_step_s,
                    **{kind: figures_of_kind[-1] for kind, figures_of_kind in saves.items() if figures_of_kind},
                }
            )
    disk = [disk_bytes_per_s(folder, rank, size // workers) for _ in range(rounds)]
    if rank == 0:
        figures: dict[str, Any] = {
            kind: {key: statistics.median(save[key] for save in figures_of_kind) for key in figures_of_kind[0]}
            for kind, figures_of_kind in saves.items()
        }
        shares = [b["stopped"] / a["stopped"] for a, b in zip(saves["synchronous"], saves["asynchronous"], strict=True)]
        figures |= {
            "share": figures["asynchronous"]["stopped"] / figures["synchronous"]["stopped"],
            "least": min(shares),
            "most": max(shares),
            "step": statistics.median(plain),
            "disk": statistics.median(disk),
            "workers": workers,
            "rounds": rounds,
        }
        (folder / "figures.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def build(workers: int, shape: dict[str, Any]) -> tuple[Any, Any, Any]:
    """A model, its optimizer, and a step of training."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tandem.config import DataConfig, OptimizerConfig, ParallelismConfig, TrainConfig
    from tandem.train.loop import backward
    from tandem.train.objectives.objective import NextToken
    from tandem.train.parallel.mesh import Degrees
    from tandem.train.parallel.strategy import parallelize_for_training

    config = TrainConfig(
        name="bench",
        data=DataConfig(path="x", sequence_length=LENGTH),
        parallel=ParallelismConfig(workers=workers, strategy="fsdp2" if workers > 1 else "ddp"),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        batch_size=ROWS * workers,
    )
    torch.manual_seed(0)
    mesh = Degrees.of(config.parallel).mesh("cpu", workers)
    model, optimizer = parallelize_for_training(
        LlamaForCausalLM(LlamaConfig(**shape)), mesh, config, torch.device("cpu")
    )
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    rows = torch.stack([ids, ids, torch.arange(LENGTH).expand_as(ids)], 1)
    objective = NextToken(model.shard_sequence)
    targets = objective.count(rows) * workers

    def step() -> None:
        loss, _ = backward(model, rows, targets, config, workers, objective)
        model.step(optimizer, 1.0, None, loss)

    return model, optimizer, step


def record_time(times: list[float], checkpoint: Any) -> None:
    """Record the time at which a checkpoint was committed."""
    times.append(time.perf_counter())


def broadcast_flag(value: bool) -> bool:
    """The value on rank 0, the only rank that is notified of a commit."""
    import torch.distributed as dist

    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def disk_bytes_per_s(folder: Path, rank: int, size: int) -> float:
    """Bytes a second of all ranks together, of a plain file each that is written and synced."""
    import torch.distributed as dist

    block = os.urandom(min(size, 2**24))
    path = folder / f"raw-{rank}"
    dist.barrier()
    start_time = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    dist.barrier()
    seconds = time.perf_counter() - start_time
    path.unlink()
    return dist.get_world_size() * (size // len(block)) * len(block) / seconds


COLUMNS = ("save", "stopped s", "slowed s", "to whole s", "MB", "written MB/s", "of the disk")


def rows_of(figures: dict[str, Any]) -> list[list[str]]:
    """The cells of the table."""
    rows = []
    for kind in ("synchronous", "asynchronous"):
        save = figures[kind]
        rate = save["bytes"] / save["to whole"]
        rows.append(
            [kind, *(f"{save[key]:.2f}" for key in ("stopped", "slowed", "to whole")), f"{save['bytes'] / 1e6:.0f}",
             f"{rate / 1e6:.0f}", f"{rate / figures['disk']:.2f}"]
        )  # fmt: skip
    return rows


def title(figures: dict[str, Any]) -> str:
    """Title of the table: workload and machine."""
    return (
        f"One checkpoint of {figures['workers']} processes on {figures['cores']} cores, gloo; "
        f"medians of {figures['rounds']} rounds; a step takes {figures['step']:.2f} s, the disk {figures['disk'] / 1e6:.0f} MB/s"
    )


def verdict(figures: dict[str, Any]) -> Verdict:
    """Whether the bar is met."""
    message = (
        f"The asynchronous stop is {figures['share']:.1%} of the synchronous one "
        f"({figures['least']:.1%} to {figures['most']:.1%}); the bar is {BAR:.0%}"
    )
    return Verdict(figures["share"] <= BAR, BAR / max(figures["share"], 1e-9), message)


def markdown(figures: dict[str, Any]) -> str:
    """The table as a page."""
    table = report.markdown_table(COLUMNS, rows_of(figures))
    return f"# What a checkpoint costs\n\n{title(figures)}.\n\n{table}\n\n{verdict(figures)}\n"


if __name__ == "__main__":
    sys.exit(main())
