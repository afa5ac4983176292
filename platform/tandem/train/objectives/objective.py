"""What is learned: an objective tells how many things a step is a mean over, and what a micro-batch loses in sum.

One number for a step, whatever the micro-batches and ranks: the sum over all tokens (or pairs), divided by their count.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tandem.data.packing import IGNORED
from tandem.errors import LayoutError
from tandem.train.objectives.cross_entropy import chunked_cross_entropy
from tandem.train.stage import ShardSequence, whole_sequence

Sums = dict[str, Tensor]
"""Further numbers of a micro-batch, by name: float32 scalars, summed over what the objective counts."""


class Objective(Protocol):
    """What the loop and the evaluation ask of pretraining, fine-tuning and DPO alike."""

    @property
    def unit(self) -> str:
        """What is counted: tokens or pairs."""
        ...

    def count(self, rows: Tensor) -> Tensor:
        """How many there are in rows [B, 3 or 6, T]: int64 scalar."""
        ...

    def loss(self, model: nn.Module, rows: Tensor) -> tuple[Tensor, Sums]:
        """The summed loss of rows (a scalar to differentiate), and what else to report of them."""
        ...


class NextToken:
    """Cross-entropy of the next token where labels say so: pretraining, and fine-tuning on answers."""

    unit = "tokens"

    def __init__(self, shard_sequence: ShardSequence = whole_sequence) -> None:
        """`shard_sequence` selects this rank's part of a sequence, under context parallelism."""
        self._shard_sequence = shard_sequence

    def count(self, rows: Tensor) -> Tensor:
        """Tokens with loss in rows [B, 3, T]."""
        return count_targets(rows[:, 1])

    def loss(self, model: nn.Module, rows: Tensor) -> tuple[Tensor, Sums]:
        """Summed cross-entropy in nats of rows [B, 3, T]."""
        return self.of_logits(compute_logits(model, rows[:, 0], rows[:, 2]), rows[:, 1]), {}

    def of_logits(self, logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
        """Summed cross-entropy in nats of this rank's logits; the labels are those of whole sequences."""
        return summed_cross_entropy(logits_BTV, self._shard_sequence(shift_labels(labels_BT)))


def next_token(objective: Objective) -> NextToken:
    """The objective, if it can be computed from logits alone, as the last stage of a pipeline does; else LayoutError."""
    if not isinstance(objective, NextToken):
        raise LayoutError(
            f"{type(objective).__name__} does not work across pipeline stages: it asks the model several times. "
            "Set parallel.pipeline to 1."
        )
    return objective


def count_targets(labels_BT: Tensor) -> Tensor:
    """Tokens with loss in rows of labels (the first token of a row has none before it), int64 scalar."""
    return (labels_BT[:, 1:] != IGNORED).sum()


def compute_logits(model: nn.Module, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
    """The model's logits [B, T, V] for packed rows."""
    # No attention mask: transformers then builds one from the positions, which keeps documents apart.
    logits: Tensor = model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits
    return logits


def summed_cross_entropy(logits_BTV: Tensor, wanted_BT: Tensor) -> Tensor:
    """Summed cross-entropy (nats) of logits with the tokens they are to tell; they may be a DTensor cut along the vocabulary."""
    wanted = wanted_BT.flatten()
    logits_NV = logits_BTV.flatten(0, 1)
    if isinstance(logits_NV, DTensor):
        # Under `loss_parallel`, which the loop sets for forward and backward.
        total: Any = F.cross_entropy(logits_NV.float(), wanted, ignore_index=IGNORED, reduction="sum")
        return total.to_local() if isinstance(total, DTensor) else total
    kept = (wanted != IGNORED).nonzero().squeeze(1)
    if 2 * len(kept) < len(wanted):
        # Prompts and padding need no softmax: of a fine-tuning row, most tokens.
        logits_NV, wanted = logits_NV.index_select(0, kept), wanted[kept]
    return chunked_cross_entropy(logits_NV, wanted)


def shift_labels(labels_BT: Tensor) -> Tensor:
    """For each place, the label of the next one, which is what its logits are to tell; none at the end of a row."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


def step_loss(total: Tensor, targets: Tensor, ranks: int) -> Tensor:
    """What a rank differentiates, so that the mean over ranks is the gradient of the mean over all tokens (or pairs).

    `total`: this micro-batch's summed loss; `targets`: what the objective counts over all ranks and micro-batches of the step.
    """
    return total * (ranks / targets.clamp(min=1)).to(torch.float32)
