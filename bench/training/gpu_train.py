"""Training a 1B-class Llama on one GPU: tokens/s, MFU and peak memory of Tandem, of plain torch, and of the transformers Trainer.

    python -m bench.training.gpu_train [--rounds N] [--recompute MODE] [--json FILE] [--check]

The model has the shape of Llama-3.2-1B and random weights; rows are synthetic, one document each, so nothing is fetched. All
compute in bfloat16 with float32 weights and fused AdamW, each layer compiled. `plain` is a hand-written loop on FSDP2 with
causal flash attention; `trainer` shards nothing, and recomputes all or nothing (with `--recompute selective`, nothing);
`tandem` is Tandem's `place` and `train` as a worker calls them, with attention that allows many documents a row, which the
others' does not. Each peer is a process of its own, in alternating rounds; tokens/s is the median over steps after the first
ones. MFU counts 6 N + 12 L h s operations a token (tandem/train/reporting/flops.py), of the maker's dense bfloat16 peak. A
peer that runs out of memory is marked so in the table, and the others go on.

`--check` exits 1, and prints the figure that was missed last, unless Tandem reaches 45 % MFU on an H100 or H200, 0.95 of plain's
tokens/s, and the Trainer's. `--smoke` runs the same code with a small model on whatever is there, a CPU too: it shows that it
works, no more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from bench.harness import report
from bench.harness.options import options_parser
from bench.harness.report import Verdict

MFU_BAR, BAR = 0.45, 0.95
BARRED = ("H100", "H200")
"""Devices that the MFU's bar is for."""
DROPPED = 5
"""First steps, which compile and warm up, left out of the median."""
RATE, DECAY, BETAS, CLIP = 1e-4, 0.01, (0.9, 0.95), 1.0
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        "max_position_embeddings": 131_072, "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
    "tiny": {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
    },
}  # fmt: skip
PEERS = ("plain", "trainer", "tandem")


def main() -> int:
    parser = options_parser(__doc__, smoke="a small model, few short steps, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rows", type=int, default=8, help="rows in a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a row")
    parser.add_argument("--layers", type=int, help="fewer than the model has: a shorter run")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="selective")
    parser.add_argument("--attention", choices=("flex", "sdpa"), help="Tandem's; without it flex, or sdpa on a CPU")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.steps, options.rows, options.length = 1, DROPPED + 3, 4, 64
    if options.peer:
        print(json.dumps(run_peer(options)))
        return 0
    results = measure(options)
    report.show(title(results), COLUMNS, cells(results))
    report.write(options.json, results, markdown(results))
    return report.judge(verdicts(results), check=options.check)


# ---- one peer, in a process of its own ------------------------------------------------------------------------------


class Run:
    """Device, model, rows and step times of one run, for every peer."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from tandem.train.reporting.flops import MfuMeter

        self.options = options
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        shape = dict(SHAPES["tiny" if options.smoke else "Llama-3.2-1B"])
        if options.layers:
            shape["num_hidden_layers"] = options.layers
        torch.manual_seed(0)
        with self.device:
            self.model = LlamaForCausalLM(LlamaConfig(**shape))
        self.meter = MfuMeter.of(
            self.model, device=self.device, workers=1, sequence_length=options.length, precision="bfloat16"
        )
        ids = torch.randint(shape["vocab_size"], (4 * options.rows, options.length), dtype=torch.int32)
        self.rows = torch.stack([ids, ids, torch.arange(options.length, dtype=torch.int32).expand_as(ids)], 1)
        self.step_times: list[float] = []
        self.losses: list[float] = []

    def take(self, count: int) -> Any:
        """The next `count` rows (count, 3, T): four steps' worth, over and over."""
        import numpy as np

        first = len(self.losses) * self.options.rows
        return self.rows.numpy()[np.arange(first, first + count) % len(self.rows)]

    def note(self, loss: float) -> None:
        """A step is over, on the device too: its loss is known."""
        self.losses.append(loss)
        self.step_times.append(time.perf_counter())

    def figures(self) -> dict[str, Any]:
        """Throughput, utilization and losses of this run."""
        step_s = [
            end - start for start, end in zip(self.step_times[DROPPED:], self.step_times[DROPPED + 1 :], strict=False)
        ]
        speed = self.options.rows * self.options.length / statistics.median(step_s)
        return {"tokens_per_s": speed, "losses": self.losses, **dataclasses.asdict(self.meter.read(speed))}


def run_peer(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one peer; {"error"} if the device's memory is too small for it."""
    import torch
    import torch.distributed as dist

    run = Run(options)
    if options.peer != "trainer":
        backend = "nccl" if run.device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        {"plain": plain, "trainer": trainer, "tandem": tandem}[options.peer](run)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    on_gpu = run.device.type == "cuda"
    return {**run.figures(), "device": torch.cuda.get_device_name(run.device) if on_gpu else "CPU"}


def plain(run: Run) -> None:
    """FSDP2 by hand, compiled layer by layer, in the order that torchtitan composes these in."""
    import functools

    import torch
    import torch.nn.functional as F
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    options, model = run.options, run.model
    aten = torch.ops.aten
    saved_operations = [
        aten.mm.default, aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_cudnn_attention.default, aten._scaled_dot_product_efficient_attention.default,
    ]  # fmt: skip
    selective: dict[str, Any] = {
        "context_fn": functools.partial(create_selective_checkpoint_contexts, saved_operations)
    }
    mesh = init_device_mesh(run.device.type, (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for number, layer in enumerate(model.model.layers):
        module: Any = layer
        if options.recompute != "none":
            module = checkpoint_wrapper(layer, **(selective if options.recompute == "selective" else {}))
        if options.compile:
            module = torch.compile(module)
        model.model.layers[number] = fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True)
    model.train()
    for _ in range(options.steps):
        ids = torch.from_numpy(run.take(options.rows)[:, 0]).to(run.device, torch.long)
        # No mask: rows are one document, and sdpa takes its causal flash kernel.
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        run.note(loss.item())


def trainer(run: Run) -> None:
    """The transformers Trainer as its documentation sets it up for speed on one GPU."""
    import tempfile

    from torch.utils.data import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    options = run.options

    class Rows(Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return options.steps * options.rows

        def __getitem__(self, index: int) -> dict[str, Any]:
            ids = run.rows[index % len(run.rows), 0].long()
            return {"input_ids": ids, "labels": ids}

    class Notes(TrainerCallback):
        def on_log(self, arguments: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                run.note(logs["loss"])

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=options.steps, per_device_train_batch_size=options.rows, bf16=True,
            torch_compile=options.compile, gradient_checkpointing=options.recompute == "full", learning_rate=RATE,
            weight_decay=DECAY, adam_beta1=BETAS[0], adam_beta2=BETAS[1], max_grad_norm=CLIP, optim="adamw_torch_fused",
            lr_scheduler_type="constant", warmup_steps=0, train_sampling_strategy="sequential", logging_steps=1,
            save_strategy="no", report_to=[], use_cpu=run.device.type == "cpu", disable_tqdm=True,
        )  # fmt: skip
        Trainer(model=run.model, args=arguments, train_dataset=Rows(), callbacks=[Notes()]).train()


def tandem(run: Run) -> None:
    """Tandem's own code, from the model on."""
    from tandem.config import DataConfig, OptimizerConfig, ParallelismConfig, TrainConfig
    from tandem.train.loop import LoopState, train
    from tandem.train.model.recompute import recompute_activations
    from tandem.train.optimizer import build_optimizer
    from tandem.train.parallel.mesh import Degrees
    from tandem.train.parallel.parallelize import parallelize

    options, on_gpu = run.options, run.device.type == "cuda"
    config = TrainConfig(
        name="gpu-train",
        data=DataConfig(path="synthetic", sequence_length=options.length),
        parallel=ParallelismConfig(gpus_per_worker=float(on_gpu)),
        optimizer=OptimizerConfig(
            learning_rate=RATE, weight_decay=DECAY, betas=BETAS, clip_norm=CLIP, schedule="constant", warmup_steps=0
        ),
        steps=options.steps,
        batch_size=options.rows,
        precision="bfloat16",
        recompute=options.recompute,
        compile=options.compile,
        attention=options.attention or ("flex" if on_gpu and options.compile else "sdpa"),
    )
    mesh = Degrees.of(config.parallel).mesh(run.device.type, 1)
    parallel_model = parallelize(recompute_activations(run.model, config.recompute), mesh, config, run.device)
    train(
        parallel_model, build_optimizer(parallel_model, config.optimizer, run.device), run, config, LoopState(),
        report=lambda step: run.note(step.loss), save=lambda state: None, device=run.device,
    )  # fmt: skip


# ---- the measurement ------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run every peer `rounds` times, in alternation."""
    rounds = report.Rounds(options.json)
    for number in range(options.rounds):
        rounds.append({peer: spawn(peer) for peer in options.peers.split(",")})
        texts = (f"{p} {f.get('error') or format(f['tokens_per_s'], ',.0f') + ' tok/s'}" for p, f in rounds[-1].items())
        print(f"round {number + 1}: {', '.join(texts)}", flush=True)
    peers: dict[str, Any] = {}
    for peer in rounds[0]:
        completed = [r[peer] for r in rounds if "error" not in r[peer]]
        if len(completed) < len(rounds):
            peers[peer] = {"error": next(r[peer]["error"] for r in rounds if "error" in r[peer])}
            continue
        figures = {k: statistics.median(f[k] for f in completed) for k in ("tokens_per_s", "mfu", "memory_bytes")}
        peers[peer] = figures | {"losses": completed[-1]["losses"], "device": completed[-1]["device"]}
        for other in ("plain", "trainer"):
            pairs = [(r[peer], r[other]) for r in rounds if other in r and "error" not in r[other]]
            if pairs:
                peers[peer][f"of_{other}"] = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs]
    device = next((f["device"] for f in peers.values() if "device" in f), "unknown")
    settings = {k: getattr(options, k) for k in ("rounds", "steps", "rows", "length", "layers", "recompute", "compile")}
    return {"device": device, "model": "tiny" if options.smoke else "Llama-3.2-1B", "peers": peers, **settings}


def spawn(peer: str) -> dict[str, Any]:
    """One run of one peer, with the same options."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-m", "bench.training.gpu_train", *sys.argv[1:], "--peer", peer],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise SystemExit(f"{peer} ended with status {process.returncode}:\n{process.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return figures


# ---- results ---------------------------------------------------------------------------------------------------------


def verdicts(results: dict[str, Any]) -> list[Verdict]:
    """The figures that have a bar, with their verdicts."""
    tandem_figures = results["peers"].get("tandem")
    if tandem_figures is None:
        return []
    if "error" in tandem_figures:
        return [Verdict(False, 0.0, f"Tandem: {tandem_figures['error']}")]
    verdict_list = []
    if any(name in results["device"] for name in BARRED) and results["model"] != "tiny":
        message = f"Tandem: {100 * tandem_figures['mfu']:.1f} % MFU; the bar is {100 * MFU_BAR:.0f} %"
        verdict_list.append(Verdict(tandem_figures["mfu"] >= MFU_BAR, tandem_figures["mfu"] / MFU_BAR, message))
    for peer, bar in (("plain", BAR), ("trainer", 1.0)):
        if f"of_{peer}" in tandem_figures and peer != "tandem":
            share = statistics.median(tandem_figures[f"of_{peer}"])
            message = f"Tandem has {share:.3f} of the tokens/s of {peer}; the bar is {bar}"
            verdict_list.append(Verdict(share >= bar, share / bar, message))
    return verdict_list


COLUMNS = ("peer", "tokens/s", "MFU", "peak memory", "of plain (least-most)", "loss: first, last")


def title(results: dict[str, Any]) -> str:
    """Title of the table: workload and machine."""
    layers = f" cut to {results['layers']} layers" if results["layers"] else ""
    return (
        f"{results['model']}{layers} on {results['device']}: bfloat16, {results['rows']} x {results['length']} tokens a step, "
        f"recompute {results['recompute']}, {'compiled' if results['compile'] else 'not compiled'}, "
        f"{results['steps']} steps, medians of {results['rounds']} rounds"
    )


def cells(results: dict[str, Any]) -> list[list[str]]:
    """The rows of the table."""
    rows = []
    for peer, f in results["peers"].items():
        if "error" in f:
            rows.append([peer, f["error"], "-", "-", "-", "-"])
            continue
        shares = f.get("of_plain")
        share = f"{statistics.median(shares):.3f} ({min(shares):.3f}-{max(shares):.3f})" if shares else "-"
        rows.append(
            [
                peer, f"{f['tokens_per_s']:,.0f}", f"{100 * f['mfu']:.1f} %", f"{f['memory_bytes'] / 2**30:.1f} GiB", share,
                f"{f['losses'][0]:.3f}, {f['losses'][-1]:.3f}",
            ]
        )  # fmt: skip
    return rows


def markdown(results: dict[str, Any]) -> str:
    """The result for a page."""
    table = report.markdown_table(COLUMNS, cells(results))
    return f"# Training on one GPU\n\n{title(results)}.\n\n{table}\n\n{report.verdict_lines(verdicts(results))}\n"


if __name__ == "__main__":
    sys.exit(main())
