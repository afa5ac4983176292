"""The training loop: torch only. Rows come in, reports and saves go out through callbacks; where it runs is not its business."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.parallel import loss_parallel

from tandem.config import TrainConfig
from tandem.data.packing import RowSource
from tandem.train.anomalies import LossSpike, NonFiniteGuard, SkippedStep, SpikeDetector
from tandem.train.ema import Ema
from tandem.train.objectives.objective import NextToken, Objective, Sums, next_token, step_loss
from tandem.train.optimizer import set_learning_rate
from tandem.train.parallel.mesh import Degrees
from tandem.train.parallel.model import ParallelModel
from tandem.train.parallel.pipeline import Pipeline
from tandem.train.precision import LossScaler, autocast_context
from tandem.train.schedule import learning_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What is known after an optimizer step; the same on every rank."""

    step: int
    loss: float
    """Mean over what the objective counts in the step: tokens with loss (in nats), or pairs."""
    grad_norm: float
    """Before clipping; not finite in a float16 step that was left out."""
    learning_rate: float
    tokens: int
    """Tokens of all rows since training began (padding too), over all ranks."""
    tokens_per_s: float
    """Since the last report."""
    seconds: float
    """Since this process began to train."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What else the objective reports, as means over the step; with float16, the loss scale."""


@dataclass
class LoopState:
    """What goes on from step to step, beside model and optimizer; saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    rows: int = 0
    """Rows of the stream that are behind; what was left out counts too."""


CONTINUE, SAVE, STOP = 0, 1, 2
"""What may be wanted of a run after a step."""


class LoopHooks:
    """What the loop tells whoever looks after it, and asks; nobody does here."""

    def poll_request(self) -> int:
        """What is wanted after this step: CONTINUE, SAVE or STOP; asked on every rank, the first one's answer counts."""
        return CONTINUE

    def on_phase(self, phase: str, step: int) -> None:
        """The rank begins something: step, evaluate or save."""

    def on_data_wait(self, seconds: float) -> None:
        """It has its rows of a step, after so long."""

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

    Returns whether it came to the end; it does not if `hooks` ask it to leave, and then it has saved. Raises JobError after too
    many steps that were not finite, LossSpike for a loss that jumped if the config says so.
    """
    hooks = hooks or LoopHooks()
    nonfinite = NonFiniteGuard(config.faults.max_nonfinite)
    spikes = SpikeDetector(config.faults.spike) if config.faults.spike else None
    objective = objective or NextToken(model.share)
    model.train()
    degrees = model.mesh.degrees
    data_ranks, ranks, spread = degrees.data_parallel, degrees.token_parallel, dist.is_initialized()
    share = config.batch_size // data_ranks
    began = marked = time.perf_counter()
    since = 0
    while state.step < config.steps:
        state.step += 1
        rate = learning_rate(config.optimizer, state.step, config.steps)
        set_learning_rate(optimizer, rate)
        hooks.on_phase("step", state.step)
        pausing = time.perf_counter()
        taken_rows = rows.take(share)
        hooks.on_data_wait(time.perf_counter() - pausing)
        batch = torch.from_numpy(taken_rows).to(device=device, dtype=torch.long)
        targets, request = objective.count(batch), hooks.poll_request()
        if spread:
            # One exchange for both: the first rank says what is wanted.
            told = torch.stack([targets, torch.full_like(targets, request if dist.get_rank() == 0 else 0)])
            dist.all_reduce(told)
            # Pipeline, context and tensor peers have counted the same rows.
            targets, requested = told[0] // (dist.get_world_size() // data_ranks), told[1]
        else:
            requested = torch.full_like(targets, request)
        scale = scaler.scale if scaler else 1.0
        total, sums = backward(model, batch, targets, config, ranks, objective, scale)
        norm, taken = model.step(optimizer, config.optimizer.clip_norm, scaler, total)
        if taken and ema:
            ema.update(model)
        if taken:
            nonfinite.record_taken()
        elif scaler is None or scaler.scale <= 1.0:
            # A float16 step that overflows is nothing to be told of, as long as the scale can be lowered.
            suspects = _suspects(total, state.rows, share, degrees)
            hooks.on_skipped_step(nonfinite.record_skipped(state.step, state.rows, config.batch_size, suspects))
            nonfinite.check()
        state.rows += config.batch_size
        # A row of preferences is two rows of tokens.
        tokens = config.batch_size * batch.shape[1] // 3 * batch.shape[2]
        state.tokens += tokens
        since += tokens
        last = state.step == config.steps
        if state.step % config.log_every == 0 or last:
            sums = {"loss": total, **sums}
            values = torch.stack([value.float() for value in sums.values()]) / targets.clamp(min=1)
            if spread:
                dist.all_reduce(values)
                # Tensor peers have the same loss.
                values /= model.mesh.degrees.tp
            means = dict(zip(sums, values.tolist(), strict=True))
            now = time.perf_counter()
            loss = means.pop("loss")
            report(
                StepReport(
                    step=state.step,
                    loss=loss,
                    grad_norm=norm,
                    learning_rate=rate,
                    tokens=state.tokens,
                    tokens_per_s=since / max(1e-9, now - marked),
                    seconds=now - began,
                    metrics=means | ({"loss_scale": scale} if scaler else {}),
                )
            )
            marked, since = now, 0
            if spikes is not None and (median := spikes.median_exceeded_by(loss)) is not None:
                raise LossSpike(step=state.step, rows=state.rows, loss=loss, median=median)
        pausing = time.perf_counter()
        if evaluate and config.evaluation and (last or _due(state.step, config.evaluation.every_steps)):
            hooks.on_phase("evaluate", state.step)
            evaluate(state.step)
        # Read here: by now a GPU has long known it.
        order = int(requested)
        if last or order or _due(state.step, config.checkpoint.every_steps):
            hooks.on_phase("save", state.step)
            save(state)
        if order == STOP and not last:
            return False
        # The next report's speed is that of training, not of the disk.
        marked += time.perf_counter() - pausing
    return True


def _suspects(total: Tensor, first: int, share: int, degrees: Degrees) -> list[int]:
    """Rows of this step whose rank's own loss is not finite; every rank calls it."""
    bad = [not bool(torch.isfinite(total))]
    if dist.is_initialized():
        found: list[bool | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, bad[0])
        bad = [bool(one) for one in found]
    ranks = {degrees.data_rank(rank) for rank, wrong in enumerate(bad) if wrong}
    return [first + rank + number * degrees.data_parallel for rank in ranks for number in range(share)]


def _due(step: int, every: int) -> bool:
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

    Returns the summed loss (a scalar), and the sums of what else the objective reports; of a pipeline, on its last stage.
    """
    total = torch.zeros((), dtype=torch.float32, device=batch.device)
    sums: Sums = {}
    with loss_parallel():
        if model.pipeline is not None:
            _through_pipeline(model.pipeline, batch, targets, ranks, next_token(objective), scale, total)
            model.finish_gradients()
            return total, sums
        pieces = batch.chunk(config.accumulate)
        for number, piece in enumerate(pieces, 1):
            with model.gradients_synced(number == len(pieces)):
                with autocast_context(model, config.precision, batch.device):
                    summed, others = objective.loss(model, piece)
                model.backward(step_loss(summed, targets, ranks) * scale)
            total += summed.detach()
            for name, value in others.items():
                sums[name] = sums[name] + value if name in sums else value
    return total, sums


def _through_pipeline(
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
