"""What Tandem's training costs over a plain torch loop: same model, same rows, two processes each, in alternation.

    python bench/train_overhead.py [--quick] [--rounds N] [--json FILE] [--check]

Peers: `plain` is a hand-written FSDP2 loop under torchrun; `trainer` is the transformers Trainer, which on a CPU
can do DDP only; `tandem` is `python -m tandem.train.launch` on a Ray cluster that is up already, as a job finds it. Each trains
--steps steps of the same batch; steady tokens/s is the median over steps after the first ones, start-up the seconds from the
command to the end of the first step. `--check` exits 1 and prints the figure that was missed last.
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
from pathlib import Path
from typing import Any

BAR = 0.95
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of few steps: shows that it runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16, help="rows in a step, over both processes")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--check", action="store_true", help=f"exit 1 unless Tandem reaches {BAR} of the plain loop")
    parser.add_argument("--peers", default="plain,trainer,tandem")
    parser.add_argument("--peer", choices=("plain", "trainer"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        {"plain": plain_peer, "trainer": trainer_peer}[options.peer](options)
        return 0
    if options.quick:
        options.rounds, options.steps = 1, 20
    results = measure(options)
    show(results, options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(markdown(results, options))
    ratio = results["tandem_to_plain"]
    print(f"Tandem: {ratio:.3f} of the plain loop's tokens/s; the bar is {BAR}: {'met' if ratio >= BAR else 'MISSED'}.")
    return int(options.check and not ratio >= BAR)


# ---- the peers ------------------------------------------------------------------------------------------------------


def plain_peer(options: argparse.Namespace) -> None:
    """FSDP2 by hand: what someone writes who uses torch only."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = load_rows(options.folder)
    torch.manual_seed(0)
    model = new_model(options.folder)
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    share = options.batch // world
    ends = []
    for step in range(options.steps):
        start = step * options.batch + rank * share
        batch = rows[(torch.arange(share) + start) % len(rows)].long()
        logits = model(input_ids=batch[:, 0], position_ids=batch[:, 2], use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach())  # a loop tells its loss
        loss.item()
        ends.append(time.time())
    if rank == 0:
        (options.folder / "ends.json").write_text(json.dumps(ends))
    leave()


def trainer_peer(options: argparse.Namespace) -> None:
    """The transformers Trainer with DDP: on a CPU accelerate shards nothing, whatever `fsdp` says."""
    import torch
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    torch.set_num_threads(1)
    rows = load_rows(options.folder)

    class Rows(Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids, labels, positions = rows[index].long()
            return {"input_ids": ids, "labels": labels, "position_ids": positions}

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.time())

    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(options.folder / "trainer"), max_steps=options.steps,
        per_device_train_batch_size=options.batch // 2, learning_rate=3e-3, weight_decay=0.01, adam_beta2=0.95,
        lr_scheduler_type="constant", warmup_steps=0,
        max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, ddp_find_unused_parameters=False,
    )  # fmt: skip
    trainer = Trainer(model=new_model(options.folder), args=arguments, train_dataset=Rows(), callbacks=[Clock()])
    trainer.train()
    if int(os.environ.get("RANK", "0")) == 0:
        (options.folder / "ends.json").write_text(json.dumps(ends))
    leave()


def leave() -> None:
    """End the process group: left to the interpreter's end, gloo sometimes aborts when the other process went first."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def load_rows(folder: Path) -> Any:
    """The packed rows that every peer trains on."""
    import numpy as np
    import torch

    return torch.from_numpy(np.load(folder / "rows.npy"))


def new_model(folder: Path) -> Any:
    """The model that every peer trains."""
    from tandem.config import ModelConfig
    from tandem.data.tokenize import TextEncoder
    from tandem.train.model import build_model

    return build_model(ModelConfig(**SHAPE), None, TextEncoder(str(folder / "data" / "tokenizer")), seed=0)


# ---- the measurement ------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run every peer `rounds` times, in alternation."""
    from tandem.cluster import LocalCluster
    from tandem.settings import export

    load = os.getloadavg()[0]
    folder = Path(tempfile.mkdtemp(prefix="tandem-bench-"))
    try:
        prepare(folder, options)
        # torchrun's processes run at niceness 0 and Ray's at 15: beside other work, that is what would be measured.
        export({"RAY_worker_niceness": "0"})
        with_cluster = LocalCluster.start()
        try:
            rounds = []
            for number in range(options.rounds):
                found = {
                    peer: run(peer, folder, options, with_cluster.address, number) for peer in options.peers.split(",")
                }
                rounds.append(found)
                print(
                    f"round {number + 1}: "
                    + ", ".join(
                        f"{p} {f['tokens_per_s']:,.0f} tok/s, start {f['start_s']:.1f} s" for p, f in found.items()
                    ),
                    flush=True,
                )
        finally:
            with_cluster.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    peers = {
        peer: {key: statistics.median(r[peer][key] for r in rounds) for key in ("tokens_per_s", "start_s", "total_s")}
        for peer in rounds[0]
    }
    ratios = [r["tandem"]["tokens_per_s"] / r["plain"]["tokens_per_s"] for r in rounds if {"tandem", "plain"} <= set(r)]
    return {
        "rounds": rounds,
        "peers": peers,
        "tandem_to_plain": statistics.median(ratios) if ratios else float("nan"),
        "steps": options.steps,
        "batch_rows": options.batch,
        "row_tokens": options.length,
        "processes": 2,
        "cores": os.cpu_count(),
        "load_before": load,
    }


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Data for all: the standard library, packed."""
    import numpy as np

    from tandem.data.build import build_dataset
    from tandem.data.packing import pack
    from tandem.data.shards import read_samples
    from tandem.data.tokenize import TextEncoder

    index = build_dataset("stdlib", folder / "data", limit=120)
    encoder = TextEncoder(str(folder / "data" / "tokenizer"))
    texts = [sample.text for sample in read_samples(index.shard_paths(folder / "data"))]  # type: ignore[union-attr]
    np.save(folder / "rows.npy", pack(encoder.texts(texts), options.length, encoder.pad_id, split=True))


def run(peer: str, folder: Path, options: argparse.Namespace, address: str, number: int) -> dict[str, float]:
    """One run of one peer: {tokens_per_s, start_s, total_s}."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    began = time.time()
    if peer == "tandem":
        job = folder / "home" / "jobs" / f"bench-{number}"
        job.mkdir(parents=True)
        (job / "config.yaml").write_text(json.dumps(tandem_config(folder, options)))
        environment |= {"TANDEM_HOME": str(folder / "home"), "RAY_ADDRESS": address}
        command = [sys.executable, "-m", "tandem.train.launch", str(job)]
    else:
        arguments = [
            "--peer",
            peer,
            "--folder",
            str(folder),
            "--steps",
            str(options.steps),
            "--batch",
            str(options.batch),
        ]
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517", __file__,
            *arguments, "--length", str(options.length),
        ]  # fmt: skip
    (folder / "ends.json").unlink(missing_ok=True)
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    ended = time.time()
    if done.returncode:
        raise SystemExit(f"{peer} ended with status {done.returncode}:\n" + "\n".join(done.stdout.splitlines()[-30:]))
    if peer == "tandem":
        found = [json.loads(line) for line in (job / "events.jsonl").read_text().splitlines()]
        steps = [event for event in found if event["event"] == "step"]
        first = next(e["time"] for e in found if e["event"] == "started")
        ends = [first + event["seconds"] for event in steps]
    else:
        ends = json.loads((folder / "ends.json").read_text())
    took = [after - before for before, after in zip(ends[DROPPED:], ends[DROPPED + 1 :], strict=False)]
    tokens = options.batch * options.length
    return {"tokens_per_s": tokens / statistics.median(took), "start_s": ends[0] - began, "total_s": ended - began}


def tandem_config(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The same training as a Tandem job; checkpoints only at the end, as the peers have none before."""
    return {
        "name": "bench", "data": {"path": str(folder / "data"), "sequence_length": options.length}, "model": SHAPE,
        "parallel": {"workers": 2, "strategy": "fsdp2"}, "steps": options.steps, "batch_size": options.batch,
        "optimizer": {"learning_rate": 3e-3, "schedule": "constant", "warmup_steps": 0},
        "checkpoint": {"every_steps": 0}, "log_every": 1,
    }  # fmt: skip


def show(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title(results, options))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "peer" else "right")
    for row in cells(results):
        table.add_row(*row)
    Console().print(table)


COLUMNS = ("peer", "tokens/s", "of plain (least-most)", "first step after", "whole run")


def title(results: dict[str, Any], options: argparse.Namespace) -> str:
    """What was measured, and on what."""
    return (
        f"2 processes on {results['cores']} cores, batches of {options.batch} x {options.length} tokens, "
        f"{options.steps} steps, medians of {len(results['rounds'])} rounds"
    )


def cells(results: dict[str, Any]) -> list[list[str]]:
    """The rows of the table."""
    rows = []
    for peer, found in results["peers"].items():
        ratios = [r[peer]["tokens_per_s"] / r["plain"]["tokens_per_s"] for r in results["rounds"] if "plain" in r]
        share = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})" if ratios else "-"
        rows.append(
            [peer, f"{found['tokens_per_s']:,.0f}", share, f"{found['start_s']:.1f} s", f"{found['total_s']:.1f} s"]
        )
    return rows


def markdown(results: dict[str, Any], options: argparse.Namespace) -> str:
    """The result for a page."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row) + " |" for row in cells(results)]
    return f"# Training overhead\n\n{title(results, options)}.\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
