"""The loss of pretraining and of fine-tuning: cross-entropy of the next token where labels say so.

One number for a step, whatever the micro-batches and ranks: the sum over all tokens with loss, divided by their count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tandem.data.packing import IGNORED


def count_targets(labels_BT: Tensor) -> Tensor:
    """Tokens with loss in rows of labels (the first token of a row has none before it), int64 scalar."""
    return (labels_BT[:, 1:] != IGNORED).sum()


def summed_loss(model: nn.Module, rows_B3T: Tensor) -> Tensor:
    """Summed cross-entropy (nats) of one micro-batch of packed rows (see `tandem.data.packing`)."""
    ids, labels, positions = rows_B3T[:, 0], rows_B3T[:, 1], rows_B3T[:, 2]
    # No attention mask: transformers then builds one from the positions, which keeps documents apart.
    logits_BTV = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    # Labels move, not logits: shifting those copies the largest tensor of the step.
    wanted = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    logits_NV = logits_BTV.flatten(0, 1)
    kept = (wanted != IGNORED).nonzero().squeeze(1)
    if 2 * len(kept) < len(wanted):
        # Prompts and padding need no softmax: of a fine-tuning row, most tokens.
        logits_NV, wanted = logits_NV.index_select(0, kept), wanted[kept]
    return F.cross_entropy(logits_NV.float(), wanted, ignore_index=IGNORED, reduction="sum")


def step_loss(total: Tensor, targets: Tensor, ranks: int) -> Tensor:
    """What a rank differentiates, so that the mean over ranks is the gradient of the mean over all tokens.

    `total`: this micro-batch's summed loss; `targets`: tokens with loss over all ranks and micro-batches of the step.
    """
    return total * (ranks / targets.clamp(min=1)).to(torch.float32)
