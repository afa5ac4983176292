"""Evaluation: mean loss over held-out rows, always the same ones, with the same result on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.parallel import loss_parallel

from tandem.data.packing import IGNORED, Rows
from tandem.train.model.build import reshard
from tandem.train.model.precision import autocast_context
from tandem.train.objectives.objective import Objective, Sums, next_token
from tandem.train.parallel.model import ParallelModel


def evaluate(
    model: ParallelModel,
    objective: Objective,
    rows: Rows,
    *,
    batch_rows: int,
    device: torch.device,
    precision: str = "float32",
) -> dict[str, float]:
    """The mean `loss` over `rows`, `perplexity` if the objective counts tokens, and the means of its other metrics.

    Every rank calls it with all rows; each data-parallel rank takes its part, `batch_rows` at a time. Leaves the model in the
    mode it was in.
    """
    training = model.training
    model.eval()
    degrees = model.mesh.degrees
    rank = degrees.data_rank(dist.get_rank()) if dist.is_initialized() else 0
    loss = torch.zeros((), dtype=torch.float64, device=device)
    sums: dict[str, Tensor] = {}
    with torch.no_grad(), loss_parallel():
        count = objective.count(torch.from_numpy(rows.astype(np.int64)).to(device))
        for part in rank_batches(rows, rank, degrees.data_parallel, batch_rows):
            batch = torch.from_numpy(part.astype(np.int64)).to(device)
            with autocast_context(model, precision, device):
                batch_loss, batch_sums = _losses(model, objective, batch)
            loss += batch_loss
            for name, value in batch_sums.items():
                sums[name] = sums.get(name, torch.zeros_like(loss)) + value
        # Without a backward pass FSDP2 would keep parameters gathered, and stale after the next step.
        reshard(model)
    model.train(training)
    totals = torch.stack([loss, *sums.values()])
    if dist.is_initialized():
        dist.all_reduce(totals)
        # Tensor peers have the same loss; in a pipeline only the last stage has one.
        totals /= degrees.tp
    mean, *means = (totals / count.clamp(min=1)).tolist()
    metrics = {"loss": mean, **dict(zip(sums, means, strict=True))}
    if objective.unit == "tokens":
        metrics["perplexity"] = math.exp(mean) if mean < 700 else math.inf
    return metrics


def _losses(model: ParallelModel, objective: Objective, batch: Tensor) -> tuple[Tensor, Sums]:
    if model.pipeline is None:
        return objective.loss(model, batch)
    logits = model.pipeline.logits(batch)
    if logits is None:
        return torch.zeros((), device=batch.device), {}
    return next_token(objective).of_logits(logits, batch[:, 1]), {}


def rank_batches(rows: Rows, rank: int, ranks: int, batch_rows: int) -> Iterator[Rows]:
    """A rank's rows in batches, equally many on every rank because collectives must match; filled up with padding rows."""
    rank_rows = rows[rank::ranks]
    rows_per_rank = math.ceil(len(rows) / ranks)
    padding = np.repeat(rows[:1], rows_per_rank - len(rank_rows), axis=0)
    padding[:, 1::3] = IGNORED
    filled = np.concatenate((rank_rows, padding))
    for start in range(0, rows_per_rank, batch_rows):
        yield filled[start : start + batch_rows]
