"""Cuts a causal LM into pipeline stages, and runs micro-batches through them by torch's schedules."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from tandem.errors import LayoutError

TORCH_NAMES = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved1F1B", "zero_bubble": "ZBVZeroBubble"}
PARTS = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 2}
"""Parts of the model that each rank holds."""


def stages_of(rank: int, ranks: int, schedule: str) -> list[int]:
    """Numbers of the stages that pipeline rank `rank` holds, by the place that the schedule wants them at."""
    match schedule:
        case "interleaved":
            return [rank, ranks + rank]
        case "zero_bubble":  # a V: down the ranks and up again, so that the first rank has the head too
            return [rank, 2 * ranks - 1 - rank]
        case _:
            return [rank]


def layers_of_stage(stage: int, stages: int, layers: int) -> range:
    """The layers of one stage; LayoutError with the nearest count unless they divide."""
    if layers % stages:
        fits = next(n for n in range(stages, 0, -1) if layers % n == 0)
        raise LayoutError(
            f"The model's {layers} layers do not divide into {stages} stages. The nearest that works is {fits} stages: set "
            "parallel.pipeline to that (half of it with the interleaved and zero_bubble schedules)."
        )
    each = layers // stages
    return range(stage * each, (stage + 1) * each)


def cut_stages(model: nn.Module, stages: Sequence[int], of: int) -> list[nn.Module]:
    """One copy of `model` (a causal LM, or a peft model around one) for each of `stages`, without the layers of the others.

    Names stay those of the whole model, so that state dicts of all stages make up the whole one's.
    """
    made = []
    for stage in stages:
        part = copy.deepcopy(model) if stage != stages[-1] else model
        lm = causal_lm(part)
        inner = lm.model
        kept = layers_of_stage(stage, of, len(inner.layers))
        inner.layers = nn.ModuleDict({str(n): inner.layers[n] for n in kept})
        if stage > 0:
            inner.embed_tokens = None
        if stage < of - 1:
            inner.norm = None
            lm.lm_head = None
        made.append(part)
    return made


def causal_lm(model: nn.Module) -> Any:
    """The transformers model that peft may have wrapped."""
    get: Any = getattr(model, "get_base_model", None)
    return get() if get else model


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The stages that this rank holds, and the schedule that runs them."""

    schedule: Any
    has_first: bool
    has_last: bool

    @classmethod
    def of(
        cls,
        modules: Sequence[nn.Module],
        numbers: Sequence[int],
        mesh: DeviceMesh,
        *,
        schedule: str,
        micro_batches: int,
        hidden: Tensor,
        device: torch.device,
    ) -> Pipeline:
        """`hidden`: what travels between stages, on the meta device: (rows of a micro-batch, T, H)."""
        ranks = mesh.size()
        of = ranks * PARTS[schedule]
        loss = torch.empty(1, device="meta")
        ids = torch.empty(hidden.shape[:1] + (0,), dtype=torch.long, device="meta")
        stages = [
            PipelineStage(
                module, number, of, device, group=mesh.get_group(),
                input_args=(ids if number == 0 else hidden,), output_args=(loss if number == of - 1 else hidden,),
            )
            for module, number in zip(modules, numbers, strict=True)
        ]  # fmt: skip
        made = get_schedule_class(TORCH_NAMES[schedule])
        held: Any = stages if PARTS[schedule] > 1 else stages[0]
        return cls(
            # The stages' last one returns the loss itself; gradients are scaled by tokens, not by micro-batches.
            schedule=made(held, micro_batches, loss_fn=lambda output, target: output.sum(), scale_grads=False),
            has_first=0 in numbers,
            has_last=of - 1 in numbers,
        )

    def step(self, rows: Tensor, scale: Tensor) -> Tensor:
        """Forward and backward of all micro-batches of `rows`; returns the summed loss (0 where the last stage is not).

        `scale`: what every loss is multiplied by before it is differentiated.
        """
        losses: list[Tensor] = []
        self.schedule._loss_fn = lambda output, target: output.sum() * scale
        arguments = (rows[:, 0],) if self.has_first else ()
        target = rows[:, 1] if self.has_last else None
        self.schedule.step(*arguments, target=target, losses=losses, rows_B3T=rows)
        return (torch.stack(losses).sum() / scale).detach() if losses else torch.zeros((), device=rows.device)
