"""The loss on rows that are not trained on: always the same rows, and the same result on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tandem.data.packing import IGNORED, Rows
from tandem.train.model import reshard
from tandem.train.objective import Objective
from tandem.train.precision import computing


def evaluate(
    model: nn.Module,
    objective: Objective,
    rows: Rows,
    *,
    rank: int,
    ranks: int,
    batch_rows: int,
    device: torch.device,
    precision: str = "float32",
    group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """The mean loss over `rows`, with perplexity where tokens are counted, and the means of what else the objective reports.

    Every data-parallel rank calls it with all the rows and takes its share of them, `batch_rows` at a time; `group` holds
    one process for each of these ranks (None: all processes). The model comes back in the mode it was in.
    """
    training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    sums: dict[str, Tensor] = {}
    with torch.no_grad():
        count = objective.count(torch.from_numpy(rows.astype(np.int64)).to(device))
        for part in shares(rows, rank, ranks, batch_rows):
            batch = torch.from_numpy(part.astype(np.int64)).to(device)
            with computing(model, precision, device):
                summed, others = objective.loss(model, batch)
            loss += summed
            for name, value in others.items():
                sums[name] = sums.get(name, torch.zeros_like(loss)) + value
        # What FSDP2 gathered would stay gathered, and be stale after the next change of the weights.
        reshard(model)
    model.train(training)
    totals = torch.stack([loss, *sums.values()])
    if ranks > 1:
        dist.all_reduce(totals, group=group)
    mean, *others_mean = (totals / count.clamp(min=1)).tolist()
    found = {"loss": mean, **dict(zip(sums, others_mean, strict=True))}
    if objective.unit == "tokens":
        found["perplexity"] = math.exp(mean) if mean < 700 else math.inf
    return found


def shares(rows: Rows, rank: int, ranks: int, batch_rows: int) -> Iterator[Rows]:
    """A rank's rows in equally many batches on every rank, since sharded ranks run together; rows of padding fill up."""
    mine = rows[rank::ranks]
    each = math.ceil(len(rows) / ranks)
    padding = np.repeat(rows[:1], each - len(mine), axis=0)
    padding[:, 1::3] = IGNORED
    whole = np.concatenate((mine, padding))
    for start in range(0, each, batch_rows):
        yield whole[start : start + batch_rows]
