"""The training loop: torch only. Rows come in, reports and saves go out through callbacks; where it runs is not its business."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from tandem.config import TrainConfig
from tandem.data.packing import RowSource
from tandem.train.objective import count_targets, step_loss, summed_loss
from tandem.train.schedule import learning_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What is known after an optimizer step; the same on every rank."""

    step: int
    loss: float
    """Mean over the step's tokens with loss, in nats."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    tokens: int
    """Tokens of all rows since training began (padding too), over all ranks."""
    tokens_per_s: float
    """Since the last report."""
    seconds: float
    """Since this process began to train."""


@dataclass
class LoopState:
    """What goes on from step to step, beside model and optimizer; saved in every checkpoint."""

    step: int = 0
    tokens: int = 0


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: RowSource,
    config: TrainConfig,
    state: LoopState,
    *,
    ranks: int,
    report: Callable[[StepReport], None],
    save: Callable[[LoopState], None],
    device: torch.device,
) -> None:
    """Train from `state` to `config.steps`.

    Each step takes this rank's share of `config.batch_size` rows. `report` is called every `log_every` steps and at the last,
    `save` every `checkpoint.every_steps` and at the last, on every rank at the same step.
    """
    model.train()
    share = config.batch_size // ranks
    parameters = [p for p in model.parameters() if p.requires_grad]
    began = marked = time.perf_counter()
    since = 0
    while state.step < config.steps:
        state.step += 1
        rate = learning_rate(config.optimizer, state.step, config.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = torch.from_numpy(rows.take(share)).to(device=device, dtype=torch.long)
        targets = count_targets(batch[:, 1])
        if ranks > 1:
            dist.all_reduce(targets)
        total = backward(model, batch, targets, config.accumulate, ranks)
        norm = clip(parameters, config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        tokens = config.batch_size * batch.shape[2]
        state.tokens += tokens
        since += tokens
        last = state.step == config.steps
        if state.step % config.log_every == 0 or last:
            if ranks > 1:
                dist.all_reduce(total)
            now = time.perf_counter()
            report(
                StepReport(
                    step=state.step,
                    loss=float(total / targets.clamp(min=1)),
                    grad_norm=norm,
                    learning_rate=rate,
                    tokens=state.tokens,
                    tokens_per_s=since / max(1e-9, now - marked),
                    seconds=now - began,
                )
            )
            marked, since = now, 0
        every = config.checkpoint.every_steps
        if last or (every and state.step % every == 0):
            saving = time.perf_counter()
            save(state)
            # The next report's speed is that of training, not of the disk.
            marked += time.perf_counter() - saving


def backward(model: nn.Module, batch: Tensor, targets: Tensor, accumulate: int, ranks: int) -> Tensor:
    """Gradients of one step over this rank's rows, in `accumulate` micro-batches; returns the summed loss (a scalar)."""
    total = torch.zeros((), dtype=torch.float32, device=batch.device)
    pieces = batch.chunk(accumulate)
    for number, piece in enumerate(pieces, 1):
        with gradients_synced(model, number == len(pieces)):
            summed = summed_loss(model, piece)
            step_loss(summed, targets, ranks).backward()
        total += summed.detach()
    return total


@contextlib.contextmanager
def gradients_synced(model: nn.Module, sync: bool) -> Iterator[None]:
    """Exchange gradients in this backward pass only if `sync`: once a step, with the last micro-batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)
        yield
    elif isinstance(model, DistributedDataParallel) and not sync:
        with model.no_sync():
            yield
    else:
        yield


def clip(parameters: list[nn.Parameter], limit: float) -> float:
    """Scale gradients down to a global norm of `limit` (0: leave them); returns the norm before."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    if limit:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm)
