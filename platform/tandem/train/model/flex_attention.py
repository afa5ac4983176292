"""FlexAttention (Dong et al. 2024) for packed rows: computes only the blocks within a document.

sdpa has a fast kernel for causal attention, but computes all T x T products of a row under a document mask. FlexAttention skips
the blocks of 128 x 128 that are fully masked, without a synchronization with the device. It is fast only when compiled for a GPU;
elsewhere it is as exact, and slow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tandem.train.model.stage import ShardSequence

ATTENTION = "tandem_flex"
"""Name of the attention function in transformers' table."""


def use_flex_attention(model: Any) -> None:
    """Switch a transformers model to FlexAttention; its masks are then those of `document_block_mask`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS[ATTENTION] = _attend
    model.config._attn_implementation = ATTENTION


def document_block_mask(positions_BT: Tensor, shard_sequence: ShardSequence) -> Any:
    """The mask of `tandem.train.model.stage.document_mask` as a BlockMask; sequences are not sharded."""
    documents = (positions_BT == 0).cumsum(1)

    def is_visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (documents[row, query] == documents[row, key]) & (query >= key)

    rows, length = positions_BT.shape
    make = _compiled_maker() if positions_BT.is_cuda else create_block_mask
    return make(is_visible, rows, None, length, length, device=positions_BT.device)


@functools.cache
def _compiled_maker() -> Callable[..., Any]:
    # Without compilation it materializes the T x T mask first.
    return torch.compile(create_block_mask, dynamic=False)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    grouped_query = query.shape[1] != key.shape[1]
    attention: Any = flex_attention(
        query, key, value, block_mask=attention_mask, scale=kwargs.get("scaling"), enable_gqa=grouped_query
    )
    return attention.transpose(1, 2).contiguous(), None
