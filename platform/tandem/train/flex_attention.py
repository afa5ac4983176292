"""Attention that skips what a token may not see: FlexAttention (Dong et al. 2024) with the documents of packed rows as blocks.

sdpa has a fast kernel for causal attention, but none for one that also ends at a document's start: with a mask of its own it
computes all of a row's T x T products. Here blocks of 128 x 128 that no query of theirs may look into are left out, without
asking the device what is in the rows. Only compiled on a GPU is it fast; elsewhere it is as exact, and slow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tandem.train.stage import ShardSequence

ATTENTION = "tandem_flex"
"""Name of the attention function in transformers' table."""


def use_flex_attention(model: Any) -> None:
    """Make a transformers model attend by FlexAttention; its masks are then those of `document_block_mask`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS[ATTENTION] = _attend
    model.config._attn_implementation = ATTENTION


def document_block_mask(positions_BT: Tensor, shard_sequence: ShardSequence) -> Any:
    """Who may look at whom, as `tandem.train.stage.document_mask` has it, in a BlockMask; sequences are whole."""
    documents = (positions_BT == 0).cumsum(1)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (documents[row, query] == documents[row, key]) & (query >= key)

    rows, length = positions_BT.shape
    make = _compiled_maker() if positions_BT.is_cuda else create_block_mask
    return make(visible, rows, None, length, length, device=positions_BT.device)


@functools.cache
def _compiled_maker() -> Callable[..., Any]:
    # Not compiled it would make the whole T x T mask first.
    return torch.compile(create_block_mask, dynamic=False)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    grouped = query.shape[1] != key.shape[1]
    found: Any = flex_attention(
        query, key, value, block_mask=attention_mask, scale=kwargs.get("scaling"), enable_gqa=grouped
    )
    return found.transpose(1, 2).contiguous(), None
