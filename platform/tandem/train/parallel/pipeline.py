"""Pipeline parallelism: splits a causal LM into stages, and runs micro-batches through them with torch's schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from tandem.config import TrainConfig
from tandem.config.training.layout import STAGES_PER_RANK
from tandem.train.model.precision import COMPUTE_DTYPES

TORCH_NAMES = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved1F1B", "zero_bubble": "ZBVZeroBubble"}


def stages_of(rank: int, ranks: int, schedule: str) -> list[int]:
    """Numbers of the stages on pipeline rank `rank`, in the order that the schedule expects."""
    match schedule:
        case "interleaved":
            return [rank, ranks + rank]
        case "zero_bubble":  # V-shaped: down the ranks and up again, so that the first rank also has the head
            return [rank, 2 * ranks - 1 - rank]
        case _:
            return [rank]


def layers_of_stage(stage: int, stages: int, layers: int) -> range:
    """The layers of one stage; `stages` divides `layers`."""
    layers_per_stage = layers // stages
    return range(stage * layers_per_stage, (stage + 1) * layers_per_stage)


def keep_stages(lm: Any, stages: Sequence[int], of: int, layers: Sequence[range]) -> None:
    """Remove all modules that are in none of `stages` from a causal LM, in place; the others keep their names."""
    inner = lm.model
    inner.layers = nn.ModuleDict({str(n): inner.layers[n] for part in layers for n in part})
    if 0 in stages and of - 1 in stages and lm.lm_head.weight is inner.embed_tokens.weight:
        # First and last stage on one rank: two copies of the tied embedding, as on two ranks.
        lm.lm_head.weight = nn.Parameter(inner.embed_tokens.weight.detach().clone())
    if 0 not in stages:
        inner.embed_tokens = None
    if of - 1 not in stages:
        inner.norm = None
        lm.lm_head = None


def causal_lm(model: nn.Module) -> Any:
    """The transformers model, without peft's wrapper."""
    get: Any = getattr(model, "get_base_model", None)
    return get() if get else model


@dataclass(kw_only=True)
class Pipeline:
    """The stages on this rank, and the schedule that runs them."""

    name: str
    schedule: Any
    mesh: DeviceMesh
    stages: dict[int, nn.Module]
    """This rank's stages, by number."""
    between: tuple[int, int]
    """Shape of the activations between stages without the batch axis: this rank's part of a sequence, and the hidden width."""
    dtype: torch.dtype
    has_first: bool
    has_last: bool

    @classmethod
    def of(
        cls,
        stages: Mapping[int, nn.Module],
        mesh: DeviceMesh,
        *,
        config: TrainConfig,
        lm_config: Any,
        device: torch.device,
    ) -> Pipeline:
        """A pipeline of this rank's stages, by number. A step runs `config.accumulate` micro-batches."""
        parallel = config.parallel
        num_stages = mesh.size() * STAGES_PER_RANK[parallel.schedule]
        rows = config.batch_size // parallel.data // config.accumulate
        length = config.data.sequence_length // parallel.context
        dtype = COMPUTE_DTYPES.get(config.precision, torch.float32)
        local_length = length // (parallel.tensor if parallel.sequence_parallel else 1)
        ids = torch.empty(rows, config.data.sequence_length, dtype=torch.long, device="meta")
        hidden = torch.empty(rows, local_length, lm_config.hidden_size, dtype=dtype, device="meta", requires_grad=True)
        logits = torch.empty(rows, length, lm_config.vocab_size, dtype=dtype, device="meta", requires_grad=True)
        pipeline_stages = [
            PipelineStage(
                module, number, num_stages, device, group=mesh.get_group(),
                input_args=(ids if number == 0 else hidden,), output_args=(logits if number == num_stages - 1 else hidden,),
            )
            for number, module in stages.items()
        ]  # fmt: skip
        schedule_class = get_schedule_class(TORCH_NAMES[parallel.schedule])
        run: Any = pipeline_stages if STAGES_PER_RANK[parallel.schedule] > 1 else pipeline_stages[0]
        return cls(
            name=parallel.schedule,
            # The loss is scaled by tokens already, not by micro-batches.
            schedule=schedule_class(
                run, config.accumulate, loss_fn=lambda output, target: output.sum(), scale_grads=False
            ),
            mesh=mesh,
            stages=dict(stages),
            between=(local_length, lm_config.hidden_size),
            dtype=dtype,
            has_first=0 in stages,
            has_last=num_stages - 1 in stages,
        )

    def step(self, rows: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Forward and backward of all micro-batches of `rows` (B, 3, T); `loss` takes the logits and labels of each."""
        self.schedule._loss_fn = loss
        arguments = (rows[:, 0],) if self.has_first else ()
        target = rows[:, 1] if self.has_last else None
        # The concatenated logits of all micro-batches would be the largest tensor in memory.
        self.schedule.step(*arguments, target=target, return_outputs=False, positions_BT=rows[:, 2].contiguous())

    def logits(self, rows: Tensor) -> Tensor | None:
        """Forward pass of `rows` (B, 3, T) without gradients; the logits on the ranks of the last stage, else None.

        torch's schedules can evaluate, too, but not if a rank holds two consecutive stages.
        """
        ranks, group = self.mesh.size(), self.mesh.get_group()
        owner = {number: rank for rank in range(ranks) for number in stages_of(rank, ranks, self.name)}
        me, last = self.mesh.get_local_rank(), len(owner) - 1
        hidden, sends = rows[:, 0], list[dist.Work | None]()
        for number, module in sorted(self.stages.items()):
            if number > 0 and owner[number - 1] != me:
                hidden = torch.empty(len(rows), *self.between, dtype=self.dtype, device=rows.device)
                dist.recv(hidden, group=group, group_src=owner[number - 1])
            hidden = module(hidden, rows[:, 2])
            if number < last and owner[number + 1] != me:
                sends.append(dist.isend(hidden.contiguous(), group=group, group_dst=owner[number + 1]))
        for work in sends:
            if work is not None:
                work.wait()
        return hidden if self.has_last else None
