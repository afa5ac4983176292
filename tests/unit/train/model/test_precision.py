"""Lower precision is close to float32, and overflowing steps are skipped."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from tandem.config import DataConfig, ModelConfig, TrainConfig
from tandem.data.packing import Rows, pack
from tandem.data.tokenize import Encoded, TextEncoder
from tandem.train.loop import LoopState, StepReport, train
from tandem.train.model.build import build_model
from tandem.train.model.precision import LossScaler, use_float8
from tandem.train.optimizer import build_optimizer
from tandem.train.parallel.model import ParallelModel

Alone = Callable[..., ParallelModel]

CPU = torch.device("cpu")


class Repeated:
    """The same rows again and again."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def take(self, count: int) -> Rows:
        return self.rows[:count]


def run(encoder: TextEncoder, alone: Alone, precision: str, scaler: LossScaler | None = None) -> list[StepReport]:
    shape = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, max_length=64)
    config = TrainConfig(name="t", data=DataConfig(path="p"), model=shape, steps=6, batch_size=4, precision=precision)
    model = alone(build_model(shape, None, encoder, seed=0), precision=precision)
    rows = pack([Encoded(list(range(5 + n, 21 + n)), [True] * 16) for n in range(4)], 16, 0, split=True)
    reports: list[StepReport] = []
    train(
        model, build_optimizer(model, config.optimizer, CPU), Repeated(rows), config, LoopState(),
        report=reports.append, save=lambda state: None, device=CPU, scaler=scaler,
    )  # fmt: skip
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return reports


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.03), ("float16", 0.01)])
def test_lower_precision_is_close_to_float32_but_differs(
    encoder: TextEncoder, alone: Alone, precision: str, tolerance: float
):
    exact = [report.loss for report in run(encoder, alone, "float32")]
    found = [report.loss for report in run(encoder, alone, precision, LossScaler() if precision == "float16" else None)]
    assert exact[-1] < exact[0] - 0.1
    assert found == pytest.approx(exact, abs=tolerance)
    assert found != pytest.approx(exact, abs=1e-7)


def test_loss_scaling_changes_neither_norms_nor_steps(encoder: TextEncoder, alone: Alone):
    plain, scaled = run(encoder, alone, "float32"), run(encoder, alone, "float32", LossScaler(2.0**10))
    assert [r.loss for r in scaled] == pytest.approx([r.loss for r in plain], abs=1e-6)
    assert [r.grad_norm for r in scaled] == pytest.approx([r.grad_norm for r in plain], abs=1e-5)
    assert [r.metrics for r in scaled] == [{"loss_scale": 2.0**10}] * 6 and plain[0].metrics == {}


def test_overflowing_steps_are_skipped_until_the_scale_fits(encoder: TextEncoder, alone: Alone):
    reports = run(encoder, alone, "float16", LossScaler(2.0**127))
    skipped = [r for r in reports if not math.isfinite(r.grad_norm)]
    assert skipped and [r.metrics["loss_scale"] for r in reports[:2]] == [2.0**127, 2.0**126]
    assert all(r.loss == reports[0].loss for r in skipped)


def test_the_scale_halves_at_an_overflow_and_doubles_after_many_good_steps():
    scaler = LossScaler(8.0)
    assert not scaler.accept(math.inf) and scaler.scale == 4.0
    assert not scaler.accept(math.nan) and scaler.scale == 2.0
    for _ in range(LossScaler.GROWTH_STEPS - 1):
        assert scaler.accept(1.0)
    other = LossScaler()
    other.load_state_dict(scaler.state_dict())
    assert other.scale == 2.0 and other.accept(1.0) and other.scale == 4.0


def test_gradients_are_unscaled_exactly():
    gradients = [torch.tensor([3.0, 5.0]), torch.tensor([7.0])]
    LossScaler(2.0**14).unscale(g.mul_(2.0**14) for g in gradients)
    assert [g.tolist() for g in gradients] == [[3.0, 5.0], [7.0]]


@pytest.mark.gpu
def test_float8_trains_on_a_gpu(encoder: TextEncoder):
    pytest.importorskip("torchao")
    shape = ModelConfig(hidden_size=128, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=256)
    model = use_float8(build_model(shape, None, encoder, 0).cuda())
    ids = torch.arange(32, device="cuda")[None]
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert math.isfinite(float(loss)) and all(p.grad is not None for p in model.parameters())
