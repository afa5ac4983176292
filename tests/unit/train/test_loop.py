"""Non-finite steps, loss spikes, and requests of the loop's hooks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from tandem.config import CheckpointConfig, DataConfig, FaultsConfig, ModelConfig, SpikeConfig, TrainConfig
from tandem.data.packing import Rows
from tandem.data.tokenize import TextEncoder
from tandem.errors import JobError
from tandem.train.anomalies import LossSpike, SkippedStep
from tandem.train.loop import CONTINUE, SAVE, STOP, LoopHooks, LoopState, StepReport, train
from tandem.train.model.build import build_model
from tandem.train.optimizer import build_optimizer
from tandem.train.parallel.model import ParallelModel

SHAPE = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, max_length=64)
CONFIG = TrainConfig(
    name="t", data=DataConfig(path="p", sequence_length=16), model=SHAPE, steps=8, batch_size=2,
    checkpoint=CheckpointConfig(every_steps=0),
)  # fmt: skip
BROKEN = 279
"""A token that the tests break the embedding of."""


class Dealt:
    """Rows of one token, but for those of the steps that are named."""

    def __init__(self, *broken: int) -> None:
        self.broken, self.step = broken, 0

    def take(self, count: int) -> Rows:
        self.step += 1
        rows = np.full((count, 3, 16), 7, np.int32)
        rows[:, 2] = np.arange(16)
        if self.step in self.broken:
            rows[:, 0, 3] = BROKEN
        return rows


class Watcher(LoopHooks):
    """Wants something after the steps that are named."""

    def __init__(self, wishes: dict[int, int] | None = None) -> None:
        self.found: list[SkippedStep] = []
        self.wishes, self.step = wishes or {}, 0

    def poll_request(self) -> int:
        self.step += 1
        return self.wishes.get(self.step, CONTINUE)

    def on_skipped_step(self, skipped: SkippedStep) -> None:
        self.found.append(skipped)


Alone = Callable[..., ParallelModel]


def run(
    encoder: TextEncoder, alone: Alone, dealt: Dealt, *, config: TrainConfig = CONFIG, watcher: LoopHooks | None = None
) -> tuple[bool, list[StepReport], list[int], LoopState]:
    built = build_model(SHAPE, None, encoder, seed=0)
    with torch.no_grad():
        # Its output layer is another one, so that only rows with the token go wrong.
        output = torch.nn.Linear(32, built.config.vocab_size, bias=False)
        output.weight.copy_(built.get_input_embeddings().weight)
        built.config.tie_word_embeddings = False
        built.set_output_embeddings(output)
        built.get_input_embeddings().weight[BROKEN] = float("nan")
    model = alone(built)
    reports: list[StepReport] = []
    saved: list[int] = []
    state = LoopState()
    ended = train(
        model, build_optimizer(model, config.optimizer, torch.device("cpu")), dealt, config, state,
        report=reports.append, save=lambda now: saved.append(now.step), device=torch.device("cpu"), hooks=watcher,
    )  # fmt: skip
    return ended, reports, saved, state


def test_a_nonfinite_step_changes_no_weights_and_reports_its_rows(encoder: TextEncoder, alone: Alone):
    watcher = Watcher()
    ended, reports, _, state = run(encoder, alone, Dealt(3, 6), watcher=watcher)
    assert ended and state.rows == 16
    assert [r.step for r in reports if not math.isfinite(r.loss)] == [3, 6]
    assert [(f.step, f.first, f.rows, f.suspects) for f in watcher.found] == [(3, 4, 2, (4, 5)), (6, 10, 2, (10, 11))]
    # The steps after it go on from the weights before it.
    assert all(math.isfinite(r.loss) for r in reports if r.step in (4, 5, 7, 8))
    assert reports[-1].loss < reports[0].loss


def test_no_step_is_taken_for_a_nonfinite_loss_with_finite_gradients(encoder: TextEncoder, alone: Alone):
    model = alone(build_model(SHAPE, None, encoder, seed=0))
    optimizer = build_optimizer(model, CONFIG.optimizer, torch.device("cpu"))
    for loss, wanted in ((1.0, True), (math.inf, False), (math.nan, False)):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        norm, taken = model.step(optimizer, 1.0, None, torch.tensor(loss))
        assert taken is wanted and math.isfinite(norm) is wanted
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same is not wanted


def test_too_many_nonfinite_steps_in_a_row_end_the_run(encoder: TextEncoder, alone: Alone):
    config = replace(CONFIG, faults=FaultsConfig(max_nonfinite=2))
    with pytest.raises(JobError, match=r"2 steps in a row.*step 4 \(rows 6 to 7.*step 5 \(rows 8 to 9"):
        run(encoder, alone, Dealt(2, 4, 5), config=config)


def test_hooks_can_request_a_save_or_a_stop(encoder: TextEncoder, alone: Alone):
    ended, reports, saved, _ = run(encoder, alone, Dealt(), watcher=Watcher({2: SAVE, 5: STOP}))
    assert not ended and saved == [2, 5] and reports[-1].step == 5
    ended, reports, saved, _ = run(encoder, alone, Dealt(), watcher=Watcher({8: STOP}))
    # It was at its end anyway.
    assert ended and saved == [8]


def test_a_loss_spike_ends_the_loop_before_a_save(encoder: TextEncoder, alone: Alone):
    class Jump(Dealt):
        def take(self, count: int) -> Rows:
            rows = super().take(count)
            if self.step == 6:
                rows[:, :2] = np.arange(100, 116)
            return rows

    config = replace(
        CONFIG,
        faults=FaultsConfig(spike=SpikeConfig(factor=1.2, window=3)),
        optimizer=replace(CONFIG.optimizer, learning_rate=0.01, warmup_steps=0),
        checkpoint=CheckpointConfig(every_steps=6),
    )
    with pytest.raises(LossSpike) as found:
        run(encoder, alone, Jump(), config=config)
    assert (found.value.step, found.value.rows) == (6, 12)
    assert found.value.loss > 1.2 * found.value.median
