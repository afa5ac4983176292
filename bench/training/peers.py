"""Hand-written training loops: those that bench/training/train_overhead.py compares Tandem with, run by torchrun.

    torchrun --nproc-per-node=N bench/training/peers.py PEER LAYOUT FOLDER

`plain` is torch alone, on a stock transformers Llama: DDP, FSDP2, FSDP2 x tensor parallel with sequence parallelism (as torch's
tutorial has it), and a pipeline of two stages cut by hand under torch's 1F1B. `trainer` is the transformers Trainer. `loop` is
Tandem's own loop without Ray: what is left between it and `tandem` is Ray's. FOLDER holds model/, rows.npy (steps x rows, 3,
tokens; every peer takes the same) and plan.json; rank 0 writes said.json: when each step ended, and its loss.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

RATE, DECAY, BETAS, CLIP = 3e-3, 0.01, (0.9, 0.95), 1.0
PIPELINE_PIECES = 4
"""Micro-batches of a step through the pipeline."""


class Run:
    """The plan, the rows, and the notes of one process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan: dict[str, Any] = json.loads((folder / "plan.json").read_text())
        self.steps, self.batch = int(self.plan["steps"]), int(self.plan["batch"])
        self.rows = torch.from_numpy(np.load(folder / "rows.npy"))
        self.step_times: list[float] = []
        self.losses: list[float] = []

    def model(self) -> Any:
        """The model that all start from."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder / "model", dtype=torch.float32)

    def share(self, step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """Ids, next tokens and positions of a rank's rows of a step, and how many tokens of the whole step have loss."""
        batch_rows = self.rows[step * self.batch : (step + 1) * self.batch].long()
        ids, labels, positions = batch_rows[rank::ranks].unbind(1)
        return ids, F.pad(labels[:, 1:], (0, 1), value=-100), positions, int((batch_rows[:, 1, 1:] != -100).sum())

    def note(self, loss: float) -> None:
        """A step is over."""
        self.losses.append(loss)
        self.step_times.append(time.time())

    def write(self) -> None:
        """Write step times and losses to the folder."""
        if int(os.environ.get("RANK", "0")) == 0:
            (self.folder / "said.json").write_text(json.dumps({"ends": self.step_times, "losses": self.losses}))


def main(peer: str, layout: str, folder: str) -> None:
    torch.set_num_threads(1)
    run = Run(Path(folder))
    if peer == "trainer":
        trainer(run)
    else:
        dist.init_process_group("gloo")
        (loop if peer == "loop" else PLAIN[layout])(run)
    run.write()
    # Left to the interpreter's end, gloo sometimes aborts when the other process went first.
    dist.barrier()
    dist.destroy_process_group()


# ---- torch alone ----------------------------------------------------------------------------------------------------


def ddp(run: Run) -> None:
    """Whole models that average their gradients."""
    model = nn.parallel.DistributedDataParallel(run.model(), gradient_as_bucket_view=True)
    _train_whole(run, model, dist.get_rank(), dist.get_world_size())


def fsdp2(run: Run) -> None:
    """Parameters, gradients and optimizer in shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = run.model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _train_whole(run, model, dist.get_rank(), dist.get_world_size())


def fsdp2_tp2(run: Run) -> None:
    """Two ranks share each matrix product and the sequence between them; pairs of those share the parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        loss_parallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    model = run.model()
    sharded, replicated = Shard(1), Replicate()
    for layer in model.model.layers:
        parallelize_module(
            layer,
            mesh["tp"],
            {
                "input_layernorm": SequenceParallel(use_local_output=True),
                "self_attn": PrepareModuleInput(
                    input_kwarg_layouts={"hidden_states": sharded},
                    desired_input_kwarg_layouts={"hidden_states": replicated},
                ),
                "self_attn.q_proj": ColwiseParallel(),
                "self_attn.k_proj": ColwiseParallel(),
                "self_attn.v_proj": ColwiseParallel(),
                "self_attn.o_proj": RowwiseParallel(output_layouts=sharded),
                "post_attention_layernorm": SequenceParallel(use_local_output=True),
                "mlp": PrepareModuleInput(input_layouts=(sharded,), desired_input_layouts=(replicated,)),
                "mlp.gate_proj": ColwiseParallel(),
                "mlp.up_proj": ColwiseParallel(),
                "mlp.down_proj": RowwiseParallel(output_layouts=sharded),
            },
        )
    parallelize_module(
        model,
        mesh["tp"],
        {
            "model.embed_tokens": RowwiseParallel(input_layouts=replicated, output_layouts=sharded),
            "model.norm": SequenceParallel(),
            "lm_head": ColwiseParallel(input_layouts=sharded, output_layouts=Shard(-1), use_local_output=False),
        },
    )
    model.lm_head.weight = model.model.embed_tokens.weight
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    mask = functools.partial(_mask, model.config)
    with loss_parallel():
        _train_whole(run, model, mesh["dp"].get_local_rank(), mesh["dp"].size(), mask=mask, copies=2)


def _mask(config: Any, positions: Tensor) -> Tensor:
    """transformers' causal mask from positions of whole sequences; its model would build one for a rank's part only."""
    from transformers.masking_utils import create_causal_mask

    shape = torch.empty(*positions.shape, 0)
    return create_causal_mask(
        config=config, inputs_embeds=shape, attention_mask=None, past_key_values=None, position_ids=positions
    )


def _train_whole(
    run: Run,
    model: Any,
    rank: int,
    ranks: int,
    *,
    mask: Callable[[Tensor], Tensor] = lambda positions: None,  # type: ignore[assignment,return-value]
    copies: int = 1,
) -> None:
    """The loop of a model that every rank calls whole; `copies` ranks have the same rows."""
    optimizer = _optimizer(model.parameters())
    for step in range(run.steps):
        ids, targets, positions, tokens = run.share(step, rank, ranks)
        logits = model(input_ids=ids, attention_mask=mask(positions), position_ids=positions, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum") / tokens
        (loss * ranks).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        reported_loss = loss.detach()
        reported_loss = reported_loss.full_tensor() if hasattr(reported_loss, "full_tensor") else reported_loss.clone()
        dist.all_reduce(reported_loss)  # a loop tells its loss
        run.note(reported_loss.item() / copies)


class Half(nn.Module):
    """One of two stages of a Llama: embedding and first layers, or last layers, norm and head."""

    def __init__(self, model: Any, first: bool) -> None:
        super().__init__()
        inner, middle = model.model, len(model.model.layers) // 2
        self.config = model.config
        self.embed = inner.embed_tokens if first else None
        self.layers = inner.layers[:middle] if first else inner.layers[middle:]
        self.rotary = inner.rotary_emb
        self.norm: Any = None if first else inner.norm
        self.head: Any = None if first else model.lm_head

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Ids of the first stage or hidden states of the second, to hidden states or logits."""
        hidden = x if self.embed is None else self.embed(x)
        mask = _mask(self.config, positions)
        rotary = self.rotary(hidden, position_ids=positions)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        return hidden if self.head is None or self.norm is None else self.head(self.norm(hidden))


def pp2(run: Run) -> None:
    """Two stages of half the layers each. Both hold the tied embedding, and add up its gradients."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    rank = dist.get_rank()
    stage_module = Half(run.model(), first=rank == 0)
    tied_weight = stage_module.embed.weight if stage_module.embed is not None else stage_module.head.weight
    tokens = 1

    def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        return loss / tokens

    stage = PipelineStage(stage_module, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, PIPELINE_PIECES, loss_fn=loss_of, scale_grads=False)
    optimizer = _optimizer(stage_module.parameters())
    for step in range(run.steps):
        ids, targets, positions, tokens = run.share(step, 0, 1)
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(ids, positions=positions, return_outputs=False)
        else:
            schedule.step(target=targets, positions=positions, losses=losses, return_outputs=False)
        dist.all_reduce(tied_weight.grad)
        gradients = [
            p.grad for p in stage_module.parameters() if p.grad is not None and (p is not tied_weight or rank == 0)
        ]
        squares = torch.nn.utils.get_total_norm(gradients).square()
        dist.all_reduce(squares)
        torch.nn.utils.clip_grads_with_norm_(stage_module.parameters(), CLIP, squares.sqrt())
        optimizer.step()
        optimizer.zero_grad()
        reported_loss = torch.stack(losses).detach().sum() if losses else torch.zeros(())
        dist.all_reduce(reported_loss)
        run.note(reported_loss.item())


def _optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Fused AdamW that decays matrices only."""
    trainable = list(parameters)
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True)


PLAIN = {"ddp": ddp, "fsdp2": fsdp2, "fsdp2_tp2": fsdp2_tp2, "pp2": pp2}


# ---- the transformers Trainer ---------------------------------------------------------------------------------------


def trainer(run: Run) -> None:
    """With DDP: on a CPU accelerate shards nothing, whatever `fsdp` says."""
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Rows(Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return len(run.rows)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            ids, labels, positions = run.rows[index].long()
            return {"input_ids": ids, "labels": labels, "position_ids": positions}

    class Notes(TrainerCallback):
        def on_log(self, arguments: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                run.note(logs["loss"])

    ranks = int(os.environ["WORLD_SIZE"])
    arguments = TrainingArguments(
        output_dir=str(run.folder / "trainer"), max_steps=run.steps, per_device_train_batch_size=run.batch // ranks,
        learning_rate=RATE, weight_decay=DECAY, adam_beta1=BETAS[0], adam_beta2=BETAS[1], max_grad_norm=CLIP,
        lr_scheduler_type="constant", warmup_steps=0, train_sampling_strategy="sequential", logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    Trainer(model=run.model(), args=arguments, train_dataset=Rows(), callbacks=[Notes()]).train()


# ---- Tandem's loop, without Ray -------------------------------------------------------------------------------------


def loop(run: Run) -> None:
    """`place` and `train`, as a worker of a job calls them."""
    from tandem.config import TrainConfig
    from tandem.config.load import from_dict
    from tandem.train.loop import LoopState, train
    from tandem.train.optimizer import build_optimizer
    from tandem.train.parallel.mesh import Degrees
    from tandem.train.parallel.parallelize import parallelize

    config = from_dict(TrainConfig, run.plan["config"])
    cpu, mesh = torch.device("cpu"), Degrees.of(config.parallel).mesh("cpu", dist.get_world_size())
    degrees = mesh.degrees
    rank, ranks = degrees.data_rank(dist.get_rank()), degrees.data_parallel
    model = parallelize(run.model(), mesh, config, cpu)

    class RankRows:
        rows_taken = 0

        def take(self, count: int) -> Any:
            first, self.rows_taken = self.rows_taken, self.rows_taken + count
            return run.rows[rank::ranks][first : first + count].numpy()

    train(
        model, build_optimizer(model, config.optimizer, cpu), RankRows(), config, LoopState(),
        report=lambda step: run.note(step.loss), save=lambda state: None, device=cpu,
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
