"""Training loop in plain torch: rows come in, reports and saves go out through callbacks. Knows neither Ray nor files."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.parallel import loss_parallel

from tandem.config import TrainConfig
from tandem.data.packing import RowSource
from tandem.train.anomalies import LossSpike, NonFiniteGuard, SkippedStep, SpikeDetector
from tandem.train.ema import Ema
from tandem.train.model.precision import LossScaler, autocast_context
from tandem.train.objectives.objective import NextToken, Objective, Sums, next_token, step_loss
from tandem.train.optimizer import set_learning_rate
from tandem.train.parallel.mesh import Degrees
from tandem.train.parallel.model import ParallelModel
from tandem.train.parallel.pipeline import Pipeline
from tandem.train.schedule import learning_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """Report of an optimizer step; the same on every rank."""

    step: int
    loss: float
    """Mean over what the objective counts in the step: tokens with loss (in nats), or pairs."""
    grad_norm: float
    """Before clipping; not finite in a float16 step that was skipped."""
    learning_rate: float
    tokens: int
    """Tokens of all rows since training began (padding too), over all ranks."""
    tokens_per_s: float
    """Since the last report."""
    seconds: float
    """Since this process began to train."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Other metrics of the objective, as means over the step; with float16, the loss scale."""


@dataclass
class LoopState:
    """Progress of a run, beside model and optimizer; saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    rows: int = 0
    """Rows of the stream that were consumed, skipped ones included."""


CONTINUE, SAVE, STOP = 0, 1, 2
"""Requests to the loop after a step."""


class LoopHooks:
    """Callbacks of the loop into its supervision; these do nothing."""

    def poll_request(self) -> int:
        """CONTINUE, SAVE or STOP after this step. Called on every rank; the answer of rank 0 counts."""
        return CONTINUE

    def on_phase(self, phase: str, step: int) -> None:
        """The rank begins a phase: step, evaluate or save."""

    def on_data_wait(self, seconds: float) -> None:
        """The rank has waited `seconds` for the rows of a step."""

    def on_skipped_step(self, skipped: SkippedStep) -> None:
        """A step was not taken."""


def train(
    model: ParallelModel,
    optimizer: torch.optim.Optimizer,
    rows: RowSource,
    config: TrainConfig,
    state: LoopState,
    *,
    report: Callable[[StepReport], None],
    save: Callable[[LoopState], None],
    device: torch.device,
    objective: Objective | None = None,
    ema: Ema | None = None,
    scaler: LossScaler | None = None,
    evaluate: Callable[[int], None] | None = None,
    hooks: LoopHooks | None = None,
) -> bool:
    """Train from `state` to `config.steps`.

    Each step takes this rank's share of `config.batch_size` rows. `report` is called every `log_every` steps and at the last,
    `save` every `checkpoint.every_steps` and at the last, on every rank at the same step; so is `evaluate`, if it is given,
    every `evaluation.every_steps` and at the last. `objective`: None is the next token.

    Returns False if `hooks` requested a stop before the last step; it has saved then. Raises JobError after too many steps in a
    row that were not finite, and LossSpike if the loss jumped and `config.faults.spike` is set.
    """
    hooks = hooks or LoopHooks()
    spikes = SpikeDetector(config.faults.spike) if config.faults.spike else None
    stepper = _Stepper(
        model, optimizer, config, state, objective or NextToken(model.shard_sequence), ema, scaler, hooks
    )
    meter = _Throughput()
    model.train()
    while state.step < config.steps:
        result = stepper.step(rows, device)
        meter.add(result.tokens)
        last = state.step == config.steps
        if state.step % config.log_every == 0 or last:
            reported = stepper.report(result, meter)
            report(reported)
            if spikes is not None and (median := spikes.median_exceeded_by(reported.loss)) is not None:
                raise LossSpike(step=state.step, rows=state.rows, loss=reported.loss, median=median)
        with meter.paused():
            if evaluate and config.evaluation and (last or _is_due(state.step, config.evaluation.every_steps)):
                hooks.on_phase("evaluate", state.step)
                evaluate(state.step)
            # Read here: a GPU has computed it long ago, and nothing waits for the device.
            request = int(result.request)
            if last or request or _is_due(state.step, config.checkpoint.every_steps):
                hooks.on_phase("save", state.step)
                save(state)
            if request == STOP and not last:
                return False
    return True


class _Throughput:
    """Tokens per second of training since the last report, without evaluations and saves."""

    def __init__(self) -> None:
        self._started_at = self._last_read_at = time.perf_counter()
        self._tokens = 0

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        paused_at = time.perf_counter()
        yield
        self._last_read_at += time.perf_counter() - paused_at

    def read(self) -> tuple[float, float]:
        """Tokens per second since the last call, and seconds since the start."""
        now = time.perf_counter()
        rate = self._tokens / max(1e-9, now - self._last_read_at)
        self._last_read_at, self._tokens = now, 0
        return rate, now - self._started_at


@dataclass(frozen=True, kw_only=True)
class _StepResult:
    """An optimizer step on this rank; tensors stay on the device until a report reads them."""

    total: Tensor
    """Summed loss of this rank."""
    sums: Sums
    targets: Tensor
    """Counted targets over all ranks."""
    request: Tensor
    """Request of rank 0."""
    grad_norm: float
    learning_rate: float
    scale: float
    tokens: int
    """Tokens of all ranks, padding too."""


@dataclass
class _Stepper:
    """Takes optimizer steps, and reports them."""

    model: ParallelModel
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    state: LoopState
    objective: Objective
    ema: Ema | None
    scaler: LossScaler | None
    hooks: LoopHooks

    def __post_init__(self) -> None:
        self._nonfinite = NonFiniteGuard(self.config.faults.max_nonfinite)
        self._degrees = self.model.mesh.degrees
        extends = self.config.extends
        self._schedule_start = extends.step if extends is not None and extends.rewarm else 0
        self._rows_per_rank = self.config.batch_size // self._degrees.data_parallel

    def step(self, rows: RowSource, device: torch.device) -> _StepResult:
        """Take the next step over this rank's share of the batch."""
        config, state, scaler = self.config, self.state, self.scaler
        state.step += 1
        rate = learning_rate(config.optimizer, state.step - self._schedule_start, config.steps - self._schedule_start)
        set_learning_rate(self.optimizer, rate)
        self.hooks.on_phase("step", state.step)
        wait_started = time.perf_counter()
        batch_rows = rows.take(self._rows_per_rank)
        self.hooks.on_data_wait(time.perf_counter() - wait_started)
        batch = torch.from_numpy(batch_rows).to(device=device, dtype=torch.long)
        targets, request = self._agree(self.objective.count(batch), self.hooks.poll_request())
        scale = scaler.scale if scaler else 1.0
        total, sums = backward(self.model, batch, targets, config, self._degrees.token_parallel, self.objective, scale)
        norm, stepped = self.model.step(self.optimizer, config.optimizer.clip_norm, scaler, total)
        self._finish_step(total, stepped=stepped)
        state.rows += config.batch_size
        # A row of preferences is two rows of tokens.
        tokens = config.batch_size * batch.shape[1] // 3 * batch.shape[2]
        state.tokens += tokens
        return _StepResult(
            total=total,
            sums=sums,
            targets=targets,
            request=request,
            grad_norm=norm,
            learning_rate=rate,
            scale=scale,
            tokens=tokens,
        )

    def _agree(self, targets: Tensor, request: int) -> tuple[Tensor, Tensor]:
        """Targets of all ranks, and the request of rank 0, in one collective."""
        if not dist.is_initialized():
            return targets, torch.full_like(targets, request)
        reduced = torch.stack([targets, torch.full_like(targets, request if dist.get_rank() == 0 else 0)])
        dist.all_reduce(reduced)
        # Pipeline, context and tensor peers have counted the same rows.
        return reduced[0] // (dist.get_world_size() // self._degrees.data_parallel), reduced[1]

    def _finish_step(self, total: Tensor, *, stepped: bool) -> None:
        """Update the average after a step; record a step that was skipped, and raise JobError after too many."""
        if stepped:
            if self.ema:
                self.ema.update(self.model)
            self._nonfinite.record_taken()
        elif self.scaler is None or self.scaler.scale <= 1.0:
            # A float16 overflow is normal as long as the loss scale can be lowered.
            state = self.state
            suspect_rows = _find_suspect_rows(total, state.rows, self._rows_per_rank, self._degrees)
            skipped = self._nonfinite.record_skipped(state.step, state.rows, self.config.batch_size, suspect_rows)
            self.hooks.on_skipped_step(skipped)
            self._nonfinite.check()

    def report(self, result: _StepResult, throughput: _Throughput) -> StepReport:
        """Means over the step on all ranks; the same report on every rank."""
        sums = {"loss": result.total, **result.sums}
        values = torch.stack([value.float() for value in sums.values()]) / result.targets.clamp(min=1)
        if dist.is_initialized():
            dist.all_reduce(values)
            # Tensor peers have the same loss.
            values /= self._degrees.tp
        means = dict(zip(sums, values.tolist(), strict=True))
        loss = means.pop("loss")
        # After `tolist`, which waits for the device.
        tokens_per_s, seconds = throughput.read()
        return StepReport(
            step=self.state.step,
            loss=loss,
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            tokens=self.state.tokens,
            tokens_per_s=tokens_per_s,
            seconds=seconds,
            metrics=means | ({"loss_scale": result.scale} if self.scaler else {}),
        )


def _find_suspect_rows(total: Tensor, first: int, rows_per_rank: int, degrees: Degrees) -> list[int]:
    """Rows of this step whose rank's own loss is not finite; every rank calls it."""
    nonfinite_by_rank = [not bool(torch.isfinite(total))]
    if dist.is_initialized():
        gathered: list[bool | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, nonfinite_by_rank[0])
        nonfinite_by_rank = [bool(nonfinite) for nonfinite in gathered]
    suspect_ranks = {degrees.data_rank(rank) for rank, nonfinite in enumerate(nonfinite_by_rank) if nonfinite}
    return [first + rank + row * degrees.data_parallel for rank in suspect_ranks for row in range(rows_per_rank)]


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def backward(
    model: ParallelModel,
    batch: Tensor,
    targets: Tensor,
    config: TrainConfig,
    ranks: int,
    objective: Objective,
    scale: float = 1.0,
) -> tuple[Tensor, Sums]:
    """Gradients (times `scale`) of one step over this rank's rows, in `config.accumulate` micro-batches.

    Returns the summed loss (a scalar) and the sums of the objective's other metrics; of a pipeline, on its last stage.
    """
    total = torch.zeros((), dtype=torch.float32, device=batch.device)
    sums: Sums = {}
    with loss_parallel():
        if model.pipeline is not None:
            _pipeline_backward(model.pipeline, batch, targets, ranks, next_token(objective), scale, total)
            model.finish_gradients()
            return total, sums
        micro_batches = batch.chunk(config.accumulate)
        for number, micro_batch in enumerate(micro_batches, 1):
            with model.gradients_synced(number == len(micro_batches)):
                with autocast_context(model, config.precision, batch.device):
                    loss, metric_sums = objective.loss(model, micro_batch)
                model.backward(step_loss(loss, targets, ranks) * scale)
            total += loss.detach()
            for name, value in metric_sums.items():
                sums[name] = sums[name] + value if name in sums else value
    return total, sums


def _pipeline_backward(
    pipeline: Pipeline,
    batch: Tensor,
    targets: Tensor,
    ranks: int,
    objective: NextToken,
    scale: float,
    total: Tensor,
) -> None:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        summed = objective.of_logits(logits, labels)
        total.add_(summed.detach())
        return step_loss(summed, targets, ranks) * scale

    pipeline.step(batch, loss)
