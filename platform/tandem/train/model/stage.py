"""Pipeline stage: a causal LM, or a range of its layers, with the forward pass that training calls.

The same forward serves every layout. It calls the embedding, layers, norm and head of a transformers model, and prepares
positions and masks itself, because a rank may hold a part of the layers, of each sequence, or of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from tandem.errors import LayoutError

ShardSequence = Callable[[Tensor], Tensor]
"""Selects this rank's part of a tensor along its last axis, the sequence."""
Mask = Callable[[Tensor, ShardSequence], Any]
"""From positions of whole sequences (B, T) to the mask that the model's attention takes."""


def whole_sequence(tensor: Tensor) -> Tensor:
    """The identity: this rank's part without context parallelism."""
    return tensor


class Stage(nn.Module):
    """Layers of a transformers causal LM, with its embedding if it is the first stage and its head if it is the last."""

    def __init__(
        self,
        lm: Any,
        layers: Iterable[int],
        *,
        first: bool,
        last: bool,
        shard_sequence: ShardSequence = whole_sequence,
        mask: Mask | None = None,
    ) -> None:
        super().__init__()
        all_layers = lm.model.layers
        self.layers = nn.ModuleList(
            all_layers[str(n)] if isinstance(all_layers, nn.ModuleDict) else all_layers[n] for n in layers
        )
        self.rotary_emb = lm.model.rotary_emb
        self.embed_tokens = lm.model.embed_tokens if first else None
        self.norm = lm.model.norm if last else None
        self.lm_head = lm.lm_head if last else None
        self.tied = bool(lm.config.tie_word_embeddings)
        """Whether the head's weight is tied to the embedding's, in this stage or another."""
        self._shard_sequence = shard_sequence
        self._mask = mask or document_mask

    def forward(self, x: Tensor, positions_BT: Tensor) -> Tensor:
        """`x`: token ids (B, T) for the first stage, else hidden states; positions are those of whole sequences.

        Returns hidden states, or logits after the last layer, of this rank's part of the sequences.
        """
        local_positions = self._shard_sequence(positions_BT)
        hidden = self.embed_tokens(self._shard_sequence(x)) if self.embed_tokens is not None else x
        if isinstance(hidden, AsyncCollectiveTensor):
            # Not yet received from other ranks: a compiled layer would lose the embedding's gradient (torch 2.13).
            hidden = hidden.clone()
        rotary = self.rotary_emb(hidden, position_ids=local_positions)
        mask = self._mask(positions_BT, self._shard_sequence)
        for layer in self.layers:
            hidden = layer(
                hidden, attention_mask=mask, position_ids=local_positions, position_embeddings=rotary, use_cache=False
            )
        if self.norm is None or self.lm_head is None:
            return hidden
        logits: Tensor = self.lm_head(self.norm(hidden))
        return logits


class TransformersForward(nn.Module):
    """A whole causal LM with transformers' own forward pass, for model families without a `Stage`."""

    def __init__(self, lm: Any, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.lm = lm
        # A plain list: the modules are registered in the model already.
        self.layers = list(layers)

    def forward(self, input_ids: Tensor, positions_BT: Tensor) -> Tensor:
        """Token ids (B, T) to logits (B, T, V); transformers separates documents by their positions."""
        logits: Tensor = self.lm(input_ids=input_ids, position_ids=positions_BT, use_cache=False).logits
        return logits

    @torch.no_grad()
    def check_documents(self, device: torch.device) -> None:
        """Raise LayoutError unless a document has the same logits after another document in a row as alone."""
        ids = torch.tensor([[1, 2, 3, 4, 5, 6]], device=device)
        positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)
        training = self.training
        self.eval()
        packed, unpacked = self(ids, positions)[:, 3:], self(ids[:, 3:], positions[:, 3:])
        self.train(training)
        relative_error = float((packed - unpacked).abs().max() / unpacked.abs().max())
        # Rounding of 16-bit sums in another order.
        if not relative_error < (1e-2 if unpacked.dtype == torch.float32 else 0.1):
            raise LayoutError(
                f"{type(self.lm).__name__} does not keep the documents of a packed row apart: the logits of one change by "
                f"{relative_error:.0%} behind another. Start from a model of another family."
            )


def document_mask(positions_BT: Tensor, shard_sequence: ShardSequence) -> Tensor:
    """Causal mask within documents: bool (B, 1, this rank's queries, all keys).

    A document begins where positions start again from 0.
    """
    documents = (positions_BT == 0).cumsum(1)
    same_document = shard_sequence(documents)[:, :, None] == documents[:, None, :]
    causal = shard_sequence(positions_BT)[:, :, None] >= positions_BT[:, None, :]
    return (same_document & causal)[:, None]
