"""Every parallel layout against one process: losses and gradient norms of five steps, in float32.

    python bench/parity.py [--quick] [--only NAME ...] [--json FILE] [--check]

Each layout runs in a world of gloo processes of its own, with accumulation and clipping on, and starts from the same weights and
rows as the one process. The table shows the largest difference of a loss and of a gradient norm, relative to 1 or to the number,
whichever is larger; `--check` exits 1 where one is above 1e-5, and prints the largest last. `--quick` leaves out worlds of 8.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

BAR = 1e-5
STEPS, ROWS, LENGTH = 5, 8, 32


@dataclass(frozen=True, kw_only=True)
class Case:
    """One cell of the table."""

    model: str = "llama"
    """llama, qwen3 or moe; with `lora` or `dora` behind a plus."""
    workers: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Set: the strategy is deepspeed."""
    accumulate: int = 2
    tied: bool = True

    @property
    def name(self) -> str:
        """As the table shows it."""
        degrees = [f"{key} {value}" for key, value in (self.parallel | self.deepspeed).items()]
        return f"{self.model}: {', '.join(degrees) or 'one process'}"

    @property
    def alone(self) -> Case:
        """The same in one process."""
        return replace(self, workers=1, parallel={}, deepspeed={})


ZERO = (
    {"stage": 1},
    {"stage": 2},
    {"stage": 3},
    {"stage": 1, "offload_optimizer": "cpu"},
    {"stage": 2, "offload_optimizer": "cpu"},
    {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
)
CASES = (
    Case(workers=2, parallel={"strategy": "ddp"}),
    Case(workers=2, parallel={"strategy": "fsdp2"}),
    *(Case(workers=2, parallel={"strategy": "deepspeed"}, deepspeed=zero) for zero in ZERO),
    Case(model="llama+lora", workers=2, parallel={"strategy": "deepspeed"}, deepspeed={"stage": 3}),
    Case(workers=4, parallel={"replicate": 2}),
    Case(workers=2, parallel={"tensor": 2, "sequence_parallel": False}),
    Case(workers=2, parallel={"tensor": 2}),
    Case(workers=2, parallel={"context": 2}),
    Case(workers=2, parallel={"pipeline": 2, "schedule": "gpipe"}),
    Case(workers=2, parallel={"pipeline": 2, "schedule": "1f1b"}),
    Case(workers=2, parallel={"pipeline": 2, "schedule": "interleaved"}),
    Case(workers=2, parallel={"pipeline": 2, "schedule": "zero_bubble"}, accumulate=4),
    Case(model="qwen3", workers=2, parallel={"tensor": 2}, tied=False),
    Case(model="qwen3", workers=4, parallel={"tensor": 2}),
    Case(model="moe", workers=2, parallel={"expert": 2}),
    Case(model="moe", workers=2, parallel={"tensor": 2}),
    Case(model="moe", workers=2, parallel={"pipeline": 2}, tied=False),
    Case(model="moe", workers=4, parallel={"tensor": 2, "expert": 2}),
    Case(model="llama+lora", workers=2, parallel={"tensor": 2}),
    Case(model="llama+lora", workers=4, parallel={"tensor": 2}),
    Case(model="llama+dora", workers=4, parallel={"tensor": 2}),
    Case(workers=8, parallel={"pipeline": 2, "tensor": 2}),
    Case(model="moe", workers=8, parallel={"replicate": 2, "tensor": 2, "expert": 2}),
    Case(workers=8, parallel={"context": 2, "tensor": 2}),
)


def main() -> int:
    """Run the cases and print the table; 1 if a cell is above the bar and --check is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="no worlds of 8 processes")
    parser.add_argument("--only", nargs="+", default=[], help="cases whose name has one of these texts")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--check", action="store_true", help=f"exit 1 where a difference is above {BAR}")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        case = CASES[options.case]
        print(json.dumps(run(case.alone if options.alone else case)))
        return 0
    chosen = [
        (number, case)
        for number, case in enumerate(CASES)
        if not (options.quick and case.workers > 4) and (not options.only or any(o in case.name for o in options.only))
    ]
    known: dict[str, Any] = {}
    results = []
    for number, case in chosen:
        key = repr(case.alone)
        known[key] = known.get(key) or world(number, 1, alone=True)
        found = world(number, case.workers)
        loss, norm = (difference(known[key], found, column) for column in (0, 1))
        results.append({"case": case.name, "workers": case.workers, "loss": loss, "gradient_norm": norm})
        print(f"{case.name} ({case.workers}): {loss:.1e} {norm:.1e}", flush=True)
    show(results)
    if options.json:
        options.json.write_text(json.dumps({"bar": BAR, "results": results}, indent=1) + "\n")
    worst = max((max(r["loss"], r["gradient_norm"]) for r in results), default=0.0)
    print(f"Largest difference: {worst:.1e}; the bar is {BAR:.0e}: {'met' if worst <= BAR else 'MISSED'}.")
    return int(options.check and not worst <= BAR)


def difference(expected: list[list[float]], found: list[list[float]], column: int) -> float:
    """The largest relative difference of a column; infinite where a run ended early."""
    if len(expected) != len(found):
        return float("inf")
    pairs = ((a[column], b[column]) for a, b in zip(expected, found, strict=True))
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in pairs)


def world(number: int, workers: int, *, alone: bool = False) -> Any:
    """Run a case in `workers` processes; what rank 0 printed."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    command = [sys.executable, __file__, "--case", str(number), *(["--alone"] if alone else [])]
    with tempfile.TemporaryDirectory() as folder:
        logs = [open(Path(folder) / str(rank), "w+") for rank in range(workers)]  # noqa: SIM115 - closed below
        processes = [
            subprocess.Popen(
                command,
                env={
                    **os.environ, "RANK": str(rank), "WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                },
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=logs[rank],
                text=True,
            )
            for rank in range(workers)
        ]  # fmt: skip
        try:
            said = processes[0].communicate(timeout=600)[0]
            statuses = [process.wait(60) for process in processes]
            if any(statuses):
                rank = next(r for r, status in enumerate(statuses) if status)
                logs[rank].seek(0)
                raise SystemExit(
                    f"{CASES[number].name}: rank {rank} ended with {statuses[rank]}:\n{logs[rank].read()[-3000:]}"
                )
        finally:
            for process in processes:
                process.kill()
            for log in logs:
                log.close()
    return json.loads(said.splitlines()[-1])


def run(case: Case) -> list[list[float]]:
    """One rank of a world: [loss, gradient norm] of each step."""
    import torch
    import torch.distributed as dist

    from tandem.config import (
        DataConfig,
        DeepSpeedConfig,
        LoraConfig,
        ModelConfig,
        OptimizerConfig,
        ParallelismConfig,
        TrainConfig,
    )
    from tandem.train import deepspeed
    from tandem.train.loop import LoopState, train
    from tandem.train.lora import add_adapters
    from tandem.train.mesh import Degrees
    from tandem.train.strategy import lay_out

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cpu = torch.device("cpu")
    kind, _, adapters = case.model.partition("+")
    lora = LoraConfig(rank=4, **({"dora": True} if adapters == "dora" else {})) if adapters else None
    config = TrainConfig(
        name="parity",
        data=DataConfig(path="x", sequence_length=LENGTH),
        model=ModelConfig(base="b") if lora else ModelConfig(),
        lora=lora,
        parallel=ParallelismConfig(workers=case.workers, **case.parallel),
        deepspeed=DeepSpeedConfig(**case.deepspeed) if case.deepspeed else None,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, clip_norm=0.5, weight_decay=0.1),
        steps=STEPS,
        batch_size=ROWS,
        accumulate=case.accumulate,
    )
    model = new_model(kind, case.tied)
    if config.lora is not None:
        model = add_adapters(model, config.lora, base_id="b", seed=0)
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first: with it nothing would be learned by lora_A in the first step
                torch.nn.init.normal_(parameter, std=0.05)
    mesh = Degrees.of(config.parallel).mesh("cpu", case.workers)
    # Of so small a model, ZeRO 3 would leave all parameters whole.
    deepspeed.WHOLE_BELOW = 100
    placed, optimizer = lay_out(model, mesh, config, cpu)
    told: list[list[float]] = []
    train(
        placed, optimizer, Dealt(mesh.degrees.data_rank(dist.get_rank()), mesh.degrees.data_parallel), config, LoopState(),
        report=lambda step: told.append([step.loss, step.grad_norm]), save=lambda state: None, device=cpu,
    )  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()
    return told


def new_model(kind: str, tied: bool) -> Any:
    """A tiny model of a transformers class, the same in every process."""
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    shape: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": tied, "initializer_range": 0.15,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, head_dim=8))
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=8))
    return LlamaForCausalLM(LlamaConfig(**shape))


class Dealt:
    """Rows of one data-parallel rank: two documents a row, and stretches without loss of different lengths."""

    def __init__(self, rank: int, ranks: int) -> None:
        import numpy as np

        random = np.random.default_rng(0)
        self._rows = np.zeros((STEPS * ROWS, 3, LENGTH), np.int32)
        self._rows[:, 0] = self._rows[:, 1] = random.integers(0, 96, (STEPS * ROWS, LENGTH))
        self._rows[:, 1, :5] = -100
        self._rows[::3, 1, 20:] = -100
        for row, cut in zip(self._rows, random.integers(4, LENGTH - 4, len(self._rows)), strict=True):
            row[2] = np.concatenate([np.arange(cut), np.arange(LENGTH - cut)])
        self._rank, self._ranks, self._taken = rank, ranks, 0

    def take(self, count: int) -> Any:
        """The next `count` rows."""
        first, self._taken = self._taken, self._taken + count
        return self._rows[[(first + n) * self._ranks + self._rank for n in range(count)]]


def show(results: list[dict[str, Any]]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{STEPS} steps against one process, float32, gloo: largest relative difference")
    for column in ("layout", "processes", "loss", "gradient norm"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for r in results:
        style = "" if max(r["loss"], r["gradient_norm"]) <= BAR else "red"
        table.add_row(r["case"], str(r["workers"]), f"{r['loss']:.1e}", f"{r['gradient_norm']:.1e}", style=style)
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())
