"""Overhead of Tandem's training over the same layout written by hand: same weights, same rows, in alternation.

    python -m bench.training.train_overhead [--layout NAME ...] [--smoke] [--rounds N] [--json FILE] [--check]

Layouts: ddp and fsdp2 over two processes, fsdp2_tp2 (FSDP2 x tensor parallel, four processes) and pp2 (two pipeline stages,
1F1B). Peers (bench/training/peers.py): `plain` is that layout in torch alone under torchrun; `trainer` is the transformers
Trainer, which on a CPU can do DDP only; `loop` is Tandem's loop under torchrun, without Ray; `tandem` is
`python -m tandem.train.launch` on a Ray cluster that is up already, as a job finds it.
Each trains --steps steps; steady tokens/s is the median over steps after
the first ones, start-up the seconds from the command to the end of the first step. A share is the median over rounds of the
ratio inside a round.

`--check` exits 1, and prints the worst figure last, unless Tandem reaches 0.95 of plain in every layout, is ahead of the
Trainer where both do the same (ddp), and every peer's losses are plain's within 1e-3.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness import report
from bench.harness.options import options_parser
from bench.harness.report import Verdict
from bench.harness.servers import ROOT

BAR = 0.95
LOSS_BAR = 1e-3
"""Largest difference of a step's loss: sums in another order, over as many steps as are trained."""
DROPPED = 10
"""First steps, which warm up, left out of the median."""
SHAPE = {
    "hidden_size": 192,
    "num_layers": 4,
    "num_heads": 6,
    "num_kv_heads": 2,
    "intermediate_size": 512,
    "max_length": 512,
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One table."""

    processes: int = 2
    parallel: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    peers: tuple[str, ...] = ("plain", "tandem")


LAYOUTS = {
    "ddp": Layout(parallel={"strategy": "ddp"}, peers=("plain", "trainer", "tandem")),
    "fsdp2": Layout(parallel={"strategy": "fsdp2"}),
    "fsdp2_tp2": Layout(processes=4, parallel={"strategy": "fsdp2", "tensor": 2}),
    # As many micro-batches as the hand-written one has.
    "pp2": Layout(parallel={"pipeline": 2, "schedule": "1f1b"}, accumulate=4),
}


def main() -> int:
    parser = options_parser(__doc__, smoke="one round of few steps")
    parser.add_argument("--layout", nargs="+", choices=tuple(LAYOUTS), default=list(LAYOUTS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16, help="rows in a step, over all processes")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--peers", help="instead of each layout's own, with commas: plain,trainer,loop,tandem")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.steps = 1, 20
    results = measure(options)
    report.show(title(results), COLUMNS, cells(results), names=2, width=130)
    report.write(options.json, results, markdown(results))
    return report.judge(verdicts(results), check=options.check)


# ---- the measurement ------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run every peer of every layout `rounds` times, in alternation."""
    peers = {name: tuple((options.peers or ",".join(LAYOUTS[name].peers)).split(",")) for name in options.layout}
    load = os.getloadavg()[0]
    folder = Path(tempfile.mkdtemp(prefix="tandem-bench-"))
    cluster = None
    try:
        prepare(folder, options)
        if any("tandem" in names for names in peers.values()):
            cluster = start_cluster()
        layouts, all_rounds = {}, report.Rounds(options.json)
        for name in options.layout:
            rounds = []
            for number in range(options.rounds):
                rounds.append({p: run(p, name, folder, options, cluster and cluster.address) for p in peers[name]})
                all_rounds.append({"layout": name, **rounds[-1]})
                texts = (
                    f"{p} {f['tokens_per_s']:,.0f} tok/s, start {f['start_s']:.1f} s" for p, f in rounds[-1].items()
                )
                print(f"{name}, round {number + 1}: {'; '.join(texts)}", flush=True)
            layouts[name] = summary(rounds) | {"processes": LAYOUTS[name].processes}
    finally:
        if cluster:
            cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "layouts": layouts, "rounds": options.rounds, "steps": options.steps, "batch_rows": options.batch,
        "row_tokens": options.length, "cores": os.cpu_count(), "load_before": load,
    }  # fmt: skip


def start_cluster() -> Any:
    """A cluster as jobs find it."""
    from tandem.cluster.local import LocalCluster
    from tandem.settings import export

    # torchrun's processes run at niceness 0 and Ray's at 15: beside other work, that is what would be measured.
    export({"RAY_worker_niceness": "0"})
    return LocalCluster.start()


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Data for all: the standard library, packed, in the order in which Tandem deals it; and the model that all start from."""
    import numpy as np

    from tandem.config import ModelConfig, from_dict
    from tandem.data.build import build_dataset
    from tandem.data.order import Order, Sampler
    from tandem.data.packing import pack
    from tandem.data.shards import read_samples
    from tandem.data.tokenize import TextEncoder
    from tandem.train.model.build import build_model

    index = build_dataset("stdlib", folder / "data", limit=120)
    encoder = TextEncoder(str(folder / "data" / "tokenizer"))
    parts = []
    for path in index.shard_paths(folder / "data"):
        texts = [sample.text for sample in read_samples([path])]  # type: ignore[union-attr]
        parts.append(pack(encoder.texts(texts), options.length, encoder.pad_id, split=True))
    order = Order(shards=(len(parts),), weights=(1.0,), seed=0)
    sampler = Sampler(order, lambda position: len(parts[order.shard(position)]))
    row_positions = sampler.share(0, 1, options.steps * options.batch)
    np.save(folder / "rows.npy", np.stack([parts[position.shard][position.row] for position in row_positions]))
    build_model(from_dict(ModelConfig, SHAPE), None, encoder, seed=0).save_pretrained(folder / "model")  # type: ignore[operator]


def run(peer: str, layout: str, folder: Path, options: argparse.Namespace, address: str | None) -> dict[str, Any]:
    """One run of one peer: {tokens_per_s, start_s, total_s, losses}."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    config = tandem_config(layout, folder, options)
    start_time = time.time()
    if peer == "tandem":
        job = Path(tempfile.mkdtemp(prefix="bench-", dir=folder))
        (job / "config.yaml").write_text(json.dumps(config))
        environment |= {"TANDEM_HOME": str(folder / "home"), "RAY_ADDRESS": address or ""}
        command = [sys.executable, "-m", "tandem.train.launch", str(job)]
    else:
        (folder / "plan.json").write_text(
            json.dumps({"steps": options.steps, "batch": options.batch, "config": config})
        )
        (folder / "said.json").unlink(missing_ok=True)
        command = [
            sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={LAYOUTS[layout].processes}", "--master-port=29517",
            "--module", "bench.training.peers", peer, layout, str(folder),
        ]  # fmt: skip
    process = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    end_time = time.time()
    if process.returncode:
        last = "\n".join(process.stdout.splitlines()[-30:])
        raise SystemExit(f"{layout}: {peer} ended with status {process.returncode}:\n{last}")
    step_times, losses = tandem_steps(job) if peer == "tandem" else peer_steps(folder)
    return {
        "tokens_per_s": tokens_per_s(step_times, options.batch * options.length),
        "start_s": step_times[0] - start_time,
        "total_s": end_time - start_time,
        "losses": losses,
    }


def tandem_steps(job: Path) -> tuple[list[float], list[float]]:
    """When each step of a Tandem job ended, in seconds since 1970, and its loss."""
    events = [json.loads(line) for line in (job / "events.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    first = next(event["time"] for event in events if event["event"] == "started")
    return [first + event["seconds"] for event in steps], [event["loss"] for event in steps]


def peer_steps(folder: Path) -> tuple[list[float], list[float]]:
    """The same of a peer."""
    notes = json.loads((folder / "said.json").read_text())
    return notes["ends"], notes["losses"]


def tokens_per_s(step_times: list[float], step_tokens: int) -> float:
    """Steady throughput: of the median step, without the first ones."""
    steady = zip(step_times[DROPPED:], step_times[DROPPED + 1 :], strict=False)
    return step_tokens / statistics.median(end - start for start, end in steady)


def tandem_config(layout: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The same training as a Tandem job; checkpoints only at the end, as the peers have none before."""
    layout_config = LAYOUTS[layout]
    return {
        "name": "bench", "data": {"path": str(folder / "data"), "sequence_length": options.length}, "model": SHAPE,
        "parallel": {"workers": layout_config.processes, **layout_config.parallel},
        "steps": options.steps, "batch_size": options.batch,
        "accumulate": layout_config.accumulate, "optimizer": {"learning_rate": 3e-3, "schedule": "constant", "warmup_steps": 0},
        "checkpoint": {"every_steps": 0}, "log_every": 1,
    }  # fmt: skip


# ---- results ---------------------------------------------------------------------------------------------------------


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of rounds of {peer: figures}, shares of plain in each round, and how far losses are from plain's."""
    peers = {}
    for peer in rounds[0]:
        figures = {k: statistics.median(r[peer][k] for r in rounds) for k in ("tokens_per_s", "start_s", "total_s")}
        if "plain" in rounds[0]:
            figures["of_plain"] = [r[peer]["tokens_per_s"] / r["plain"]["tokens_per_s"] for r in rounds]
            figures["loss_off"] = max(largest_loss_difference(r[peer]["losses"], r["plain"]["losses"]) for r in rounds)
        if "trainer" in rounds[0]:
            figures["of_trainer"] = [r[peer]["tokens_per_s"] / r["trainer"]["tokens_per_s"] for r in rounds]
        figures["first_loss"], figures["last_loss"] = rounds[-1][peer]["losses"][0], rounds[-1][peer]["losses"][-1]
        peers[peer] = figures
    return {"peers": peers}


def largest_loss_difference(losses: list[float], other_losses: list[float]) -> float:
    """The largest difference of two runs' losses; infinite where one ended early."""
    return (
        max(abs(a - b) for a, b in zip(losses, other_losses, strict=True))
        if len(losses) == len(other_losses)
        else float("inf")
    )


def verdicts(results: dict[str, Any]) -> list[Verdict]:
    """The figures that have a bar, with their verdicts."""
    verdict_list = []
    for name, layout in results["layouts"].items():
        for peer, figures in layout["peers"].items():
            if peer == "tandem" and "of_plain" in figures:
                share = statistics.median(figures["of_plain"])
                message = f"{name}: Tandem has {share:.3f} of the hand-written loop's tokens/s; the bar is {BAR}"
                verdict_list.append(Verdict(share >= BAR, share / BAR, message))
            if peer == "tandem" and "of_trainer" in figures:
                share = statistics.median(figures["of_trainer"])
                verdict_list.append(
                    Verdict(share > 1, share, f"{name}: Tandem has {share:.3f} of the Trainer's; the bar is above 1")
                )
            if (loss_difference := figures.get("loss_off")) is not None and loss_difference > LOSS_BAR:
                message = f"{name}: {peer}'s losses are {loss_difference:.1e} from plain's; the bar is {LOSS_BAR:.0e}"
                verdict_list.append(Verdict(False, LOSS_BAR / loss_difference, message))
    return verdict_list


COLUMNS = ("layout", "peer", "tokens/s", "of plain (least-most)", "loss: first, last", "off", "first step", "whole run")


def title(results: dict[str, Any]) -> str:
    """Title of the table: workload and machine."""
    return (
        f"{results['cores']} cores, batches of {results['batch_rows']} x {results['row_tokens']} tokens, "
        f"{results['steps']} steps, medians of {results['rounds']} rounds"
    )


def cells(results: dict[str, Any]) -> list[list[str]]:
    """The rows of the table."""
    rows = []
    for name, layout in results["layouts"].items():
        for peer, f in layout["peers"].items():
            shares = f.get("of_plain")
            share = f"{statistics.median(shares):.3f} ({min(shares):.3f}-{max(shares):.3f})" if shares else "-"
            rows.append(
                [
                    f"{name} ({layout['processes']})", peer, f"{f['tokens_per_s']:,.0f}", share,
                    f"{f['first_loss']:.4f}, {f['last_loss']:.4f}", f"{f['loss_off']:.0e}" if shares else "-",
                    f"{f['start_s']:.1f} s", f"{f['total_s']:.1f} s",
                ]
            )  # fmt: skip
    return rows


def markdown(results: dict[str, Any]) -> str:
    """The result for a page."""
    table = report.markdown_table(COLUMNS, cells(results))
    return f"# Training overhead\n\n{title(results)}.\n\n{table}\n\n{report.verdict_lines(verdicts(results))}\n"


if __name__ == "__main__":
    sys.exit(main())
