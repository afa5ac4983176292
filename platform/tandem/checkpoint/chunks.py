"""A tensor of which this rank has some boxes: what checkpoints are written from and read into, however a model lies on the ranks.

torch.distributed.checkpoint saves and loads boxes, by their offsets in the whole tensor. What one layout has written any other
reads: both know the whole tensor by the name and shape that it has in the plain model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

Box = tuple[tuple[int, ...], Tensor]
"""Offsets in the whole tensor, and the elements there."""


class ChunkedTensor(torch.Tensor):
    """Stands for a tensor of `shape`, of which this rank has `boxes`. What is saved of it, or loaded, are those, in place.

    Nothing can be computed with it.
    """

    chunks: dict[torch.Size, Tensor]

    @staticmethod
    def __new__(cls, like: Tensor, shape: Sequence[int], boxes: Iterable[Box]) -> ChunkedTensor:
        """`like` has the type and the device."""
        made: ChunkedTensor = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=like.dtype, device=like.device
        )
        made.chunks = {torch.Size(offsets): held for offsets, held in boxes if held.numel() or not held.ndim}
        return made

    @classmethod
    def of(cls, tensor: Tensor) -> ChunkedTensor:
        """What this rank has of a tensor: of a DTensor its shard, of any other one all."""
        if isinstance(tensor, ChunkedTensor):
            return tensor
        shape, (offsets, local) = tensor.shape, local_chunk(tensor)
        return ChunkedTensor(local, shape, [(offsets, local)])

    def staged(self) -> ChunkedTensor:
        """A copy in the CPU's memory, which may be on its way from a device."""
        copies = ((tuple(at), held.detach().to("cpu", copy=True)) for at, held in self.chunks.items())
        return ChunkedTensor(torch.empty((), dtype=self.dtype), self.shape, copies)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch types its own as if nothing overrode it
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise TypeError(f"{operation} of a tensor that is there in part only")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, here={sum(b.numel() for b in self.chunks.values())})"

    # torch.distributed.checkpoint asks these three of any tensor that has them (torch.distributed._checkpointable).

    def __create_write_items__(self, fqn: str, held: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties(dtype=self.dtype), size=self.shape
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=at, sizes=held.shape) for at, held in self.chunks.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None, "what is in part has offsets"
        return self.chunks[index.offset]


def local_chunk(tensor: Tensor) -> Box:
    """The box of a tensor that this rank has, sharing its memory."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tensor
    local = tensor.to_local()
    if not local.numel():
        return (0,) * tensor.ndim, local
    (chunk,) = tensor.__create_chunk_list__()
    return tuple(chunk.offsets), local
