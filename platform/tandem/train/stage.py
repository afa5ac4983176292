"""A causal LM, or a run of its layers, as one module that training calls: rows in, hidden states or the summed loss out.

One forward for every layout. It goes through a transformers model's own embedding, layers, norm and head, but prepares
positions and masks itself, since a rank may hold a part of the layers, of each sequence, or of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from tandem.data.packing import IGNORED

Share = Callable[[Tensor], Tensor]
"""Cuts a rank's part out of a tensor, along its last axis, the sequence."""


def whole_sequence(tensor: Tensor) -> Tensor:
    """A rank's part where sequences are not shared."""
    return tensor


class Stage(nn.Module):
    """The layers that `model` (a transformers causal LM) still has, between its embedding and its head if it has those."""

    def __init__(self, model: Any, *, share: Share = whole_sequence) -> None:
        super().__init__()
        self.model = model
        self._share = share

    def forward(self, x: Tensor, rows_B3T: Tensor) -> Tensor:
        """`x`: token ids (B, T) for the first stage, else hidden states; `rows_B3T`: the packed rows (tandem.data.packing).

        Returns hidden states, or after the last layer the summed cross-entropy of this rank's tokens, of shape (1,).
        """
        lm = self.model
        inner = lm.model
        labels, positions = rows_B3T[:, 1], rows_B3T[:, 2]
        here = self._share(positions)
        hidden = inner.embed_tokens(self._share(x)) if inner.embed_tokens is not None else x
        rotary = inner.rotary_emb(hidden, position_ids=here)
        mask = document_mask(positions, self._share)
        for layer in layers_of(inner):
            hidden = layer(
                hidden, attention_mask=mask, position_ids=here, position_embeddings=rotary, use_cache=False
            )
        if lm.lm_head is None:
            return hidden
        logits = lm.lm_head(inner.norm(hidden))
        # Labels move, not logits: shifting those copies the largest tensor of the step.
        wanted = self._share(F.pad(labels[:, 1:], (0, 1), value=IGNORED))
        return summed_cross_entropy(logits, wanted).reshape(1)


def layers_of(inner: Any) -> Iterable[nn.Module]:
    """The decoder layers in order, also when some were taken out."""
    layers: Any = inner.layers.values() if isinstance(inner.layers, nn.ModuleDict) else inner.layers
    return list(layers)


def document_mask(positions_BT: Tensor, share: Share) -> Tensor:
    """Who may look at whom: earlier tokens of the same document. Bool (B, 1, this rank's queries, all keys).

    Documents are told apart by their positions, which start again from 0.
    """
    documents = (positions_BT == 0).cumsum(1)
    same = share(documents)[:, :, None] == documents[:, None, :]
    earlier = share(positions_BT)[:, :, None] >= positions_BT[:, None, :]
    return (same & earlier)[:, None]


def summed_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Summed cross-entropy in nats; logits may be a DTensor that is cut along the vocabulary."""
    wanted = labels_BT.flatten()
    logits = logits_BTV.flatten(0, 1)
    cut = isinstance(logits, DTensor)
    if not cut:
        kept = (wanted != IGNORED).nonzero().squeeze(1)
        if 2 * len(kept) < len(wanted):
            # Prompts and padding need no softmax: of a fine-tuning row, most tokens.
            logits, wanted = logits.index_select(0, kept), wanted[kept]
    with loss_parallel() if cut else nullcontext():
        total = F.cross_entropy(logits.float(), wanted, ignore_index=IGNORED, reduction="sum")
    return total.to_local() if isinstance(total, DTensor) else total
