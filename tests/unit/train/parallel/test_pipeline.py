"""Pipeline stages cover all layers, and micro-batches fit torch's schedules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.testing._internal.distributed.fake_pg import FakeStore

from tandem.config.training.layout import STAGES_PER_RANK, micro_batches_fit
from tandem.train.parallel.pipeline import TORCH_NAMES, layers_of_stage, stages_of


@pytest.fixture(params=[2, 3, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    """A world of so many ranks, of which only the first is there."""
    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def is_taken(schedule: str, ranks: int, count: int) -> bool:
    stages = [
        PipelineStage(
            nn.Linear(2, 2), number, ranks * STAGES_PER_RANK[schedule], torch.device("cpu"),
            input_args=(torch.empty(1, 2, device="meta"),), output_args=(torch.empty(1, 2, device="meta"),),
        )
        for number in stages_of(0, ranks, schedule)
    ]  # fmt: skip
    try:
        made = get_schedule_class(TORCH_NAMES[schedule])
        made(stages if STAGES_PER_RANK[schedule] > 1 else stages[0], count, loss_fn=lambda output, target: output.sum())
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("schedule", STAGES_PER_RANK)
def test_the_rule_for_micro_batches_agrees_with_torchs_schedules(ranks: int, schedule: str):
    counts = range(1, 13)
    assert [n for n in counts if micro_batches_fit(schedule, ranks, n)] == [
        n for n in counts if is_taken(schedule, ranks, n)
    ]


@pytest.mark.parametrize("schedule", STAGES_PER_RANK)
def test_every_layer_is_on_one_rank(schedule: str):
    of = 3 * STAGES_PER_RANK[schedule]
    held = [layers_of_stage(stage, of, 12) for rank in range(3) for stage in stages_of(rank, 3, schedule)]
    assert sorted(layer for layers in held for layer in layers) == list(range(12))
