"""Every parallel layout against one process: losses and gradient norms of five steps, in float32.

    python -m bench.training.parity [--workers N ...] [--only TEXT ...] [--json FILE] [--check]

What it is compared with is written by hand: a transformers model, its own forward pass, AdamW and clip_grad_norm_, one process,
no micro-batches. Every layout starts from the same weights and rows, with two micro-batches or more and gradients clipped. Beside
losses and norms each case shows
    evaluation   the loss on 7 held-out rows after training, against the hand-written one's
    exported     the same from the gathered weights in a plain transformers model, against that evaluation
    resumed      the losses of a run that was saved after step 3 and went on in a new model, against the undisturbed run's
A cell is the largest difference, relative to the number or to 1, whichever is larger. `--check` exits 1 where one is above 1e-5,
and prints the largest last. Layouts of one size run one after the other in one world of gloo processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.harness import report
from bench.harness.options import options_parser
from bench.harness.servers import ROOT

BAR = 1e-5
STEPS, SAVED, ROWS, HELD, LENGTH = 5, 3, 8, 7, 32
CLIP, RATE = 0.5, 3e-3
"""RATE: at 1e-2 AdamW made of a rounding error of 5e-8 in the first gradients one of 1e-5 in the fifth's norm."""
COLUMNS = ("loss", "gradient norm", "evaluation", "exported", "resumed")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    model: str = "llama"
    """llama, qwen3, gemma2 or moe, with `+lora` or `+dora` behind it."""
    workers: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 2
    tied: bool = True
    objective: str = "next_token"
    zero: dict[str, Any] = field(default_factory=dict)
    """Options of DeepSpeed, if the strategy is deepspeed."""
    changes: dict[str, Any] = field(default_factory=dict)
    """To the rest of the config."""
    first: bool = False
    """Whether every run of the tests tries it; the others are for `make test-all`."""

    @property
    def name(self) -> str:
        """As the table shows it."""
        settings = {**self.parallel, **self.zero, **self.changes, **({"dpo": ""} if self.objective == "dpo" else {})}
        settings_text = ", ".join(f"{key} {value}".strip().replace("_", " ") for key, value in settings.items())
        model = self.model + ("" if self.tied else " untied")
        return f"{model}: {settings_text or f'{self.workers} process'}"

    @property
    def baseline_key(self) -> str:
        """Key of the hand-written run that it is compared with."""
        return json.dumps([self.model, self.tied, self.objective])


ZERO = (
    {"stage": 1},
    {"stage": 2},
    {"stage": 3},
    {"stage": 1, "offload_optimizer": "cpu"},
    {"stage": 2, "offload_optimizer": "cpu"},
    {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
)
CASES = (
    Case(first=True),
    Case(model="moe", first=True),
    Case(workers=2, parallel={"strategy": "ddp"}, first=True),
    Case(workers=2, parallel={"strategy": "fsdp2"}, first=True),
    Case(workers=2, parallel={"strategy": "fsdp2"}, changes={"recompute": "selective"}),
    Case(workers=2, parallel={"strategy": "fsdp2"}, changes={"recompute": "full"}),
    Case(workers=2, parallel={"offload": True}),
    Case(workers=2, parallel={"strategy": "fsdp2"}, objective="dpo"),
    Case(workers=2, parallel={"tensor": 2, "sequence_parallel": False}),
    Case(workers=2, parallel={"tensor": 2}, first=True),
    Case(workers=2, parallel={"tensor": 2}, objective="dpo", first=True),
    Case(workers=2, parallel={"context": 2}, first=True),
    Case(workers=2, parallel={"pipeline": 2, "schedule": "gpipe"}),
    Case(workers=2, parallel={"pipeline": 2, "schedule": "1f1b"}, accumulate=4, first=True),
    Case(workers=2, parallel={"pipeline": 2, "schedule": "interleaved"}, first=True),
    Case(workers=2, parallel={"pipeline": 2, "schedule": "zero_bubble"}, accumulate=4, first=True),
    Case(workers=2, parallel={"pipeline": 2}, changes={"recompute": "full"}),
    Case(model="qwen3", workers=2, parallel={"tensor": 2}, tied=False, first=True),
    Case(model="qwen3", workers=2, parallel={"pipeline": 2}, tied=False),
    Case(model="gemma2", workers=2, parallel={"strategy": "fsdp2"}, first=True),
    Case(model="gemma2+lora", workers=2, parallel={"strategy": "ddp"}),
    Case(model="moe", workers=2, parallel={"strategy": "fsdp2"}),
    Case(model="moe", workers=2, parallel={"expert": 2}, first=True),
    Case(model="moe", workers=2, parallel={"tensor": 2}, first=True),
    Case(model="moe", workers=2, parallel={"pipeline": 2}),
    Case(model="llama+lora", workers=2, parallel={"strategy": "ddp"}),
    Case(model="llama+lora", workers=2, parallel={"strategy": "fsdp2"}),
    Case(model="llama+lora", workers=2, parallel={"tensor": 2}, first=True),
    Case(model="llama+lora", workers=2, parallel={"pipeline": 2}, first=True),
    *(Case(workers=2, parallel={"strategy": "deepspeed"}, zero=zero) for zero in ZERO),
    Case(workers=2, parallel={"strategy": "deepspeed"}, zero={"stage": 3}, objective="dpo"),
    Case(model="moe", workers=2, parallel={"strategy": "deepspeed"}, zero={"stage": 3}),
    Case(model="llama+lora", workers=2, parallel={"strategy": "deepspeed"}, zero={"stage": 3}),
    Case(model="llama+dora", workers=2, parallel={"strategy": "deepspeed"}, zero={"stage": 2}),
    Case(workers=4, parallel={"strategy": "deepspeed"}, zero={"stage": 3}),
    Case(model="llama+dora", workers=2, parallel={"strategy": "fsdp2"}, first=True),
    Case(model="moe+lora", workers=2, parallel={"expert": 2}),
    Case(workers=4, parallel={"replicate": 2}),
    Case(workers=4, parallel={"tensor": 2}),
    Case(workers=4, parallel={"tensor": 2, "offload": True}),
    Case(workers=4, parallel={"context": 2}),
    Case(workers=4, parallel={"pipeline": 2, "schedule": "interleaved"}, accumulate=4),
    Case(model="qwen3", workers=4, parallel={"tensor": 2, "context": 2}),
    Case(model="moe", workers=4, parallel={"tensor": 2, "expert": 2}),
    Case(model="moe", workers=4, parallel={"replicate": 2, "expert": 2}),
    Case(model="moe", workers=4, parallel={"pipeline": 2, "expert": 2}),
    Case(model="llama+lora", workers=4, parallel={"tensor": 2}),
    Case(model="llama+dora", workers=4, parallel={"tensor": 2}),
    Case(workers=8, parallel={"pipeline": 2, "tensor": 2}),
    Case(workers=8, parallel={"pipeline": 2, "schedule": "zero_bubble", "tensor": 2}, accumulate=4),
    Case(workers=8, parallel={"context": 2, "tensor": 2}),
    Case(model="moe", workers=8, parallel={"replicate": 2, "tensor": 2, "expert": 2}),
    Case(model="moe", workers=8, parallel={"pipeline": 2, "tensor": 2, "expert": 2}),
)


def main() -> int:
    """Run the cases and print the table; 1 if a cell is above the bar and --check is given."""
    parser = options_parser(
        __doc__, smoke="one process and two, DDP only", check=f"exit 1 where a difference is above {BAR}"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8], help="sizes of worlds")
    parser.add_argument("--only", nargs="+", default=[], help="cases whose name has one of these texts")
    parser.add_argument("--world", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.workers, options.only = [1, 2], ["1 process", "llama: strategy ddp"]
    if options.world:
        run_world([CASES[number] for number in json.loads(options.world)])
        return 0
    selected = (case for case in CASES if not options.only or any(text in case.name for text in options.only))
    results = measure((case for case in selected if case.workers in options.workers), options.json)
    show(results)
    report.write(options.json, {"bar": BAR, "results": results}, markdown(results))
    worst = max((r[column] for r in results for column in COLUMNS), default=0.0)
    print(f"Largest difference: {worst:.1e}; the bar is {BAR:.0e}: {'met' if worst <= BAR else 'MISSED'}.")
    return int(options.check and not worst <= BAR)


def measure(cases: Iterable[Case], path: Path | None = None) -> list[dict[str, Any]]:
    """A row of differences for each case; those of one size in one world."""
    results = report.Rounds(path)
    case_list = list(cases)
    for size in sorted({case.workers for case in case_list}):
        numbers = [CASES.index(case) for case in case_list if case.workers == size]
        for number, figures in zip(numbers, world(numbers, size), strict=True):
            case = CASES[number]
            results.append({"case": case.name, "workers": case.workers, **differences(figures)})
            print(f"{case.name} ({size}):", *(f"{results[-1][c]:.1e}" for c in COLUMNS), flush=True)
    return results


def differences(figures: dict[str, Any]) -> dict[str, float]:
    """The cells of a row."""
    tandem, baseline = figures["ours"], figures["theirs"]
    return {
        "loss": difference(baseline["losses"], tandem["losses"]),
        "gradient norm": difference(baseline["norms"], tandem["norms"]),
        "evaluation": difference([baseline["evaluation"]], [tandem["evaluation"]]),
        "exported": difference([tandem["evaluation"]], [tandem["exported"]]),
        "resumed": difference(tandem["losses"], tandem["resumed"]),
    }


def difference(expected: list[float], measured: list[float]) -> float:
    """The largest relative difference; infinite where a run ended early."""
    if len(expected) != len(measured):
        return float("inf")
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(expected, measured, strict=True))


def world(numbers: list[int], workers: int) -> Iterator[dict[str, Any]]:
    """Run cases in one world of `workers` processes; yields rank 0's figures of each."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        logs = [stack.enter_context((folder / f"log-{rank}").open("w+")) for rank in range(workers)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "bench.training.parity", "--world", json.dumps(numbers)],
                env={
                    **os.environ, "RANK": str(rank), "WORLD_SIZE": str(workers), "RENDEZVOUS": f"file://{folder}/rendezvous",
                    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder),
                },
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=logs[rank],
                cwd=ROOT,
                text=True,
            )
            for rank in range(workers)
        ]  # fmt: skip
        for process in processes:
            stack.callback(process.kill)
        assert processes[0].stdout is not None
        for line in processes[0].stdout:
            if line.startswith("{"):
                yield json.loads(line)
        failed = {rank: (folder / f"log-{rank}").read_text() for rank, p in enumerate(processes) if failing(p)}
    # Ranks that only lost a peer say little.
    for rank, log in sorted(failed.items(), key=lambda item: "closed by peer" in item[1]):
        raise SystemExit(f"Rank {rank} ended:\n{log[-4000:]}")


def failing(process: subprocess.Popen[str]) -> bool:
    """Whether a process ends with an error, or not within a minute."""
    try:
        return process.wait(60) != 0
    except subprocess.TimeoutExpired:
        return True


def run_world(cases: list[Case]) -> None:
    """One rank of a world: runs the cases; rank 0 prints a line of JSON for each."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=os.environ["RENDEZVOUS"], rank=rank, world_size=size)
    baselines: dict[str, Any] = {}
    for case in cases:
        if dist.get_rank() == 0 and case.baseline_key not in baselines:
            baselines[case.baseline_key] = run_baseline(case)
        figures = run_tandem(case)
        if dist.get_rank() == 0:
            print(json.dumps({"ours": figures, "theirs": baselines[case.baseline_key]}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def run_baseline(case: Case) -> dict[str, Any]:
    """The same training as a short loop of torch and transformers."""
    import torch

    config = config_of(replace(case, parallel={}, zero={}, changes={}, workers=1, accumulate=1))
    model = new_model(case)
    trainable = [p for p in model.parameters() if p.requires_grad]
    embeddings = (model.get_input_embeddings().weight,)
    decayed: dict[bool, list[Any]] = {True: [], False: []}
    for parameter in trainable:
        decayed[parameter.ndim > 1 and not any(parameter is e for e in embeddings)].append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": config.optimizer.weight_decay * decays}
            for decays, parameters in decayed.items()
        ],
        lr=RATE, betas=config.optimizer.betas,
    )  # fmt: skip
    loss_function = pair_loss(case) if case.objective == "dpo" else token_loss
    losses, norms = [], []
    rows = torch.from_numpy(all_rows(case)).long()
    for step in range(STEPS):
        loss = loss_function(model, rows[step * ROWS : (step + 1) * ROWS])
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(trainable, CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        evaluation = float(loss_function(model.eval(), rows[STEPS * ROWS :]))
    return {"losses": losses, "norms": norms, "evaluation": evaluation}


def token_loss(model: Any, rows: Any) -> Any:
    """The mean cross-entropy (nats) of rows (B, 3, T), by transformers' own forward pass."""
    import torch.nn.functional as F

    logits = model(input_ids=rows[:, 0], position_ids=rows[:, 2], use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1, 1:].flatten(), ignore_index=-100)


def pair_loss(case: Case) -> Callable[[Any, Any], Any]:
    """The mean DPO loss of rows (B, 6, T) with one pair each, against the model that training starts from, with other weights."""
    import torch
    import torch.nn.functional as F

    reference = new_model(case, seed=7).eval()

    def answer_log_prob(model: Any, side: Any) -> Any:
        logits = model(input_ids=side[:, 0], position_ids=side[:, 2], use_cache=False).logits[:, :-1]
        targets = side[:, 1, 1:]
        log_probs = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return (log_probs * (targets != -100)).double().sum(1)

    def loss(model: Any, rows: Any) -> Any:
        with torch.no_grad():
            reference_gain = answer_log_prob(reference, rows[:, :3]) - answer_log_prob(reference, rows[:, 3:])
        gain = answer_log_prob(model, rows[:, :3]) - answer_log_prob(model, rows[:, 3:]) - reference_gain
        return -F.logsigmoid(0.1 * gain).mean().float()

    return loss


def run_tandem(case: Case) -> dict[str, Any]:
    """Tandem's training over this world; the result is the same on every rank, except for figures of rank 0 only."""
    import torch
    import torch.distributed as dist

    from tandem.checkpoint import folders, sharded
    from tandem.checkpoint.folders import SavedState
    from tandem.train.loop import LoopState, StepReport, train
    from tandem.train.objectives.evaluate import evaluate

    config, cpu = config_of(case), torch.device("cpu")
    reports: dict[str, list[StepReport]] = {"whole": [], "resumed": []}
    rows = all_rows(case)
    root = shared_folder()

    def run_training(run: str, run_config: Any, parts: Any, state: LoopState, *, save: bool = False) -> None:
        model, optimizer, objective = parts
        degrees = model.mesh.degrees
        rank_rows = RankRows(
            rows[: STEPS * ROWS], degrees.data_rank(dist.get_rank()), degrees.data_parallel, state.step
        )

        def saved(loop_state: LoopState) -> None:
            if save:
                saved_state = SavedState(step=loop_state.step, tokens=loop_state.tokens, loss=None, world=case.workers)
                sharded.save(root, model, optimizer, saved_state, keep=1)

        train(
            model,
            optimizer,
            rank_rows,
            run_config,
            state,
            report=reports[run].append,
            save=saved,
            device=cpu,
            objective=objective,
        )

    parts = build(case, config)
    run_training("whole", config, parts, LoopState())
    evaluation = evaluate(parts[0], parts[2], rows[STEPS * ROWS :], batch_rows=ROWS // config.parallel.data, device=cpu)
    exported = export_loss(case, parts[0])
    run_training("resumed", replace(config, steps=SAVED), build(case, config), LoopState(), save=True)
    resumed_parts = build(case, config, seed=1)
    newest = folders.latest(root)
    assert newest is not None
    restored = sharded.load(newest, resumed_parts[0], resumed_parts[1])
    run_training("resumed", config, resumed_parts, LoopState(restored.step, restored.tokens))
    return {
        "losses": [step.loss for step in reports["whole"]],
        "norms": [step.grad_norm for step in reports["whole"]],
        "evaluation": evaluation["loss"],
        "exported": exported,
        "resumed": [step.loss for step in reports["resumed"]],
    }


def build(case: Case, config: Any, seed: int = 0) -> tuple[Any, Any, Any]:
    """A model over the mesh, its optimizer and its objective."""
    import torch

    from tandem.config import DpoConfig
    from tandem.train.model.recompute import recompute_activations
    from tandem.train.objectives.dpo import Dpo, FrozenReference
    from tandem.train.objectives.objective import NextToken
    from tandem.train.parallel import deepspeed
    from tandem.train.parallel.mesh import Degrees
    from tandem.train.parallel.strategy import parallelize_for_training, parallelize_frozen

    cpu = torch.device("cpu")
    mesh = Degrees.of(config.parallel).mesh("cpu", case.workers)
    # Of so small a model, ZeRO 3 would leave all parameters whole.
    deepspeed.PERSISTENCE_THRESHOLD = 100
    model, optimizer = parallelize_for_training(
        recompute_activations(new_model(case, seed), config.recompute), mesh, config, cpu
    )
    if case.objective == "dpo":
        reference = parallelize_frozen(new_model(case, seed=7).requires_grad_(False), mesh, config, cpu)
        return model, optimizer, Dpo(DpoConfig(), FrozenReference(reference))
    return model, optimizer, NextToken(model.shard_sequence)


def export_loss(case: Case, model: Any) -> float:
    """The evaluation of a plain transformers model that has the gathered weights; on ranks other than 0: of none."""
    import torch
    import torch.distributed as dist

    from tandem.checkpoint.tensors import gather_on_rank0

    weights = gather_on_rank0(model.weights())
    if dist.get_rank() != 0:
        return 0.0
    plain = new_model(case, seed=3)
    if "+" in case.model:
        # The base is the one that was trained on; the adapters are those that came out.
        plain = new_model(case)
        with torch.no_grad():
            for parameter in plain.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
    left_out = plain.load_state_dict(weights, strict=False)
    # A tied embedding has one name.
    missing = {name for name, _ in plain.named_parameters() if name in left_out.missing_keys}
    assert not left_out.unexpected_keys and (not missing or "+" in case.model)
    loss_function = pair_loss(case) if case.objective == "dpo" else token_loss
    with torch.no_grad():
        return float(loss_function(plain.eval(), torch.from_numpy(all_rows(case)[STEPS * ROWS :]).long()))


def shared_folder() -> Path:
    """A new folder that all ranks know."""
    import torch.distributed as dist

    holder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(holder, src=0)
    return Path(str(holder[0]))


def config_of(case: Case) -> Any:
    """The training config of a case."""
    from tandem.config import (
        DataConfig,
        DeepSpeedConfig,
        DpoConfig,
        LoraConfig,
        ModelConfig,
        OptimizerConfig,
        ParallelismConfig,
        TrainConfig,
    )

    _, _, adapters = case.model.partition("+")
    based = bool(adapters) or case.objective == "dpo"
    return TrainConfig(
        name="parity",
        data=DataConfig(path="x", sequence_length=LENGTH),
        model=ModelConfig(base="b") if based else ModelConfig(),
        lora=LoraConfig(rank=4, dora=adapters == "dora") if adapters else None,
        objective=case.objective,
        dpo=DpoConfig() if case.objective == "dpo" else None,
        parallel=ParallelismConfig(workers=case.workers, **case.parallel),
        deepspeed=DeepSpeedConfig(**case.zero) if case.zero else None,
        optimizer=OptimizerConfig(
            learning_rate=RATE,
            schedule="constant",
            warmup_steps=0,
            clip_norm=CLIP,
            weight_decay=0.1,
            decay_embeddings=False,
        ),
        steps=STEPS,
        batch_size=ROWS,
        accumulate=case.accumulate,
        **case.changes,
    )


def new_model(case: Case, seed: int = 0) -> Any:
    """A tiny model of a transformers class, the same in every process; adapters come filled."""
    import torch
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    from tandem.train.adapters.lora import add_adapters

    kind, _, adapters = case.model.partition("+")
    shape: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": case.tied,
        "initializer_range": 0.15,
    }  # fmt: skip
    # A base is the same whatever is put on it.
    torch.manual_seed(0 if adapters else seed)
    model: Any
    if kind == "moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, head_dim=8))
    elif kind == "gemma2":  # its layers are not known to training: it goes by transformers' own forward pass
        model = Gemma2ForCausalLM(Gemma2Config(**shape, head_dim=8, sliding_window=8))
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=8))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    if not adapters:
        return model
    lora = config_of(replace(case, workers=1, parallel={}, zero={}, changes={})).lora
    model = add_adapters(model, lora, base_id="b", seed=seed)
    torch.manual_seed(seed + 3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: with it nothing would be learned by lora_A in the first step
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def all_rows(case: Case) -> Any:
    """Training rows, then held-out rows: two documents a row, or for dpo a pair of prompts with answers."""
    import numpy as np

    random = np.random.default_rng(0)
    count = STEPS * ROWS + HELD
    num_sides = 2 if case.objective == "dpo" else 1
    rows = np.zeros((count, 3 * num_sides, LENGTH), np.int32)
    for side in range(0, 3 * num_sides, 3):
        rows[:, side] = rows[:, side + 1] = random.integers(0, 96, (count, LENGTH))
        if num_sides == 2:
            rows[:, side + 1, : 6 + side] = -100
            rows[:, side + 2] = np.arange(LENGTH)
            continue
        rows[:, 1, :5] = -100
        rows[::3, 1, 20:] = -100
        for row, boundary in zip(rows, random.integers(4, LENGTH - 4, count), strict=True):
            row[2] = np.concatenate([np.arange(boundary), np.arange(LENGTH - boundary)])
    return rows


class RankRows:
    """Rows of one data-parallel rank, from a step on."""

    def __init__(self, rows: Any, rank: int, ranks: int, step: int) -> None:
        self._rows, self._rank, self._ranks, self._rows_taken = rows, rank, ranks, step * ROWS // ranks

    def take(self, count: int) -> Any:
        """The next `count` rows."""
        first, self._rows_taken = self._rows_taken, self._rows_taken + count
        return self._rows[[(first + n) * self._ranks + self._rank for n in range(count)]]


def show(results: list[dict[str, Any]]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{STEPS} steps against a hand-written loop, float32, gloo: largest relative difference")
    for column in ("layout", "processes", *COLUMNS):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for r in results:
        style = "" if max(r[column] for column in COLUMNS) <= BAR else "red"
        table.add_row(r["case"], str(r["workers"]), *(f"{r[column]:.1e}" for column in COLUMNS), style=style)
    Console(width=130).print(table)


def markdown(results: list[dict[str, Any]]) -> str:
    """The table by layouts, as a page: for each the models that were tried, and the largest difference of any."""
    layouts: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in results:
        layouts.setdefault((row["case"].partition(": ")[2], row["workers"]), []).append(row)
    lines = [
        "# Layouts against one process",
        "",
        f"{STEPS} steps, float32, gloo: the largest relative difference of a loss, a gradient norm, the evaluation after them,",
        "that of the exported weights, or a loss of a resumed run, to a hand-written loop in one process.",
        "",
        "| layout | processes | models | largest difference |",
        "|---|---|---|---|",
    ]
    for (layout, workers), rows in layouts.items():
        models = ", ".join(row["case"].partition(": ")[0] for row in rows)
        worst = max(row[column] for row in rows for column in COLUMNS)
        lines.append(f"| {layout} | {workers} | {models} | {worst:.1e} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
