"""Training objectives: the summed loss of a micro-batch, and the number of targets that a step averages over.

The loss of a step is the sum over all tokens (or pairs) divided by their count, independent of micro-batches and ranks.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tandem.data.packing import IGNORED
from tandem.errors import LayoutError
from tandem.train.model.stage import ShardSequence, whole_sequence
from tandem.train.objectives.cross_entropy import chunked_cross_entropy

Sums = dict[str, Tensor]
"""Other metrics of a micro-batch, by name: float32 scalars, summed over the objective's targets."""


class Objective(Protocol):
    """Interface of an objective for the loop and the evaluation."""

    @property
    def unit(self) -> str:
        """Unit of the targets: tokens or pairs."""
        ...

    def count(self, rows: Tensor) -> Tensor:
        """Number of targets in rows [B, 3 or 6, T]: int64 scalar."""
        ...

    def loss(self, model: nn.Module, rows: Tensor) -> tuple[Tensor, Sums]:
        """The summed loss of rows (a differentiable scalar), and the sums of other metrics."""
        ...


class NextToken:
    """Cross-entropy of the next token at labelled positions: pretraining, and fine-tuning on answers."""

    unit = "tokens"

    def __init__(self, shard_sequence: ShardSequence = whole_sequence) -> None:
        """`shard_sequence` selects this rank's part of a sequence, under context parallelism."""
        self._shard_sequence = shard_sequence

    def count(self, rows: Tensor) -> Tensor:
        """Number of labelled tokens in rows [B, 3, T]."""
        return count_targets(rows[:, 1])

    def loss(self, model: nn.Module, rows: Tensor) -> tuple[Tensor, Sums]:
        """Summed cross-entropy in nats of rows [B, 3, T]."""
        return self.of_logits(compute_logits(model, rows[:, 0], rows[:, 2]), rows[:, 1]), {}

    def of_logits(self, logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
        """Summed cross-entropy in nats of this rank's logits; labels are those of whole sequences."""
        return summed_cross_entropy(logits_BTV, self._shard_sequence(shift_labels(labels_BT)))


def next_token(objective: Objective) -> NextToken:
    """The objective if it is computed from logits alone, as the last pipeline stage does; LayoutError otherwise."""
    if not isinstance(objective, NextToken):
        raise LayoutError(
            f"{type(objective).__name__} does not work across pipeline stages: it asks the model several times. "
            "Set parallel.pipeline to 1."
        )
    return objective


def count_targets(labels_BT: Tensor) -> Tensor:
    """Number of labelled tokens, without the first of each row, which has no predecessor: int64 scalar."""
    return (labels_BT[:, 1:] != IGNORED).sum()


def compute_logits(model: nn.Module, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
    """The model's logits [B, T, V] for packed rows."""
    # Without an attention mask, transformers builds one from the positions, which separates documents.
    logits: Tensor = model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits
    return logits


def summed_cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Summed cross-entropy (nats) of logits with their targets; the logits may be a DTensor sharded along the vocabulary."""
    targets = targets_BT.flatten()
    logits_NV = logits_BTV.flatten(0, 1)
    if isinstance(logits_NV, DTensor):
        # Inside `loss_parallel`, which the loop enters for forward and backward.
        total: Any = F.cross_entropy(logits_NV.float(), targets, ignore_index=IGNORED, reduction="sum")
        return total.to_local() if isinstance(total, DTensor) else total
    target_indices = (targets != IGNORED).nonzero().squeeze(1)
    if 2 * len(target_indices) < len(targets):
        # Most tokens of a fine-tuning row are prompts and padding, which need no softmax.
        logits_NV, targets = logits_NV.index_select(0, target_indices), targets[target_indices]
    return chunked_cross_entropy(logits_NV, targets)


def shift_labels(labels_BT: Tensor) -> Tensor:
    """Labels shifted left by one: at each position the token that its logits predict; IGNORED at the end of a row."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


def step_loss(total: Tensor, targets: Tensor, ranks: int) -> Tensor:
    """The loss that a rank differentiates: the mean of its gradient over ranks is the gradient of the mean over all targets.

    `total`: summed loss of this micro-batch; `targets`: number of targets over all ranks and micro-batches of the step.
    """
    return total * (ranks / targets.clamp(min=1)).to(torch.float32)
