"""FlexAttention computes the same attention as the document mask."""

from __future__ import annotations

from typing import Any

import torch

from tandem.train.model.flex_attention import document_block_mask, use_flex_attention
from tandem.train.model.stage import Stage, document_mask, whole_sequence


def test_the_block_mask_equals_the_document_mask() -> None:
    positions = packed_positions()
    blocks, mask = document_block_mask(positions, whole_sequence), document_mask(positions, whole_sequence)
    rows, length = positions.shape
    places = torch.arange(length)
    for row in range(rows):
        said = blocks.mask_mod(torch.tensor(row), torch.tensor(0), places[:, None], places[None])
        assert torch.equal(said, mask[row, 0])


def test_flex_attention_gives_the_logits_of_the_document_mask(model: Any) -> None:
    # On a CPU FlexAttention has no backward pass; tests/gpu compares losses over steps.
    positions = packed_positions()
    ids = torch.arange(positions.numel()).reshape(positions.shape) % 32
    layers = range(len(model.model.layers))
    with torch.no_grad():
        masked = Stage(model, layers, first=True, last=True)(ids, positions)
        use_flex_attention(model)
        in_blocks = Stage(model, layers, first=True, last=True, mask=document_block_mask)(ids, positions)
    torch.testing.assert_close(in_blocks, masked)


def packed_positions() -> torch.Tensor:
    """Two rows of two and three documents."""
    return torch.tensor([[*range(9), *range(7)], [*range(3), *range(11), *range(2)]])
