"""Chunked tensors: this rank's rectangular chunks of a global tensor, which checkpoints are written from and loaded into.

torch.distributed.checkpoint saves and loads chunks by their offsets in the global tensor. Any layout loads a checkpoint of any
other, because both use the name and shape of the tensor in the plain model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

Chunk = tuple[tuple[int, ...], Tensor]
"""Offsets in the global tensor, and the elements there."""


class ChunkedTensor(torch.Tensor):
    """A global tensor of `shape`, of which this rank has `chunks`: they are saved, and loaded into in place.

    It supports no computation.
    """

    chunks: dict[torch.Size, Tensor]

    @staticmethod
    def __new__(cls, like: Tensor, shape: Sequence[int], chunks: Iterable[Chunk]) -> ChunkedTensor:
        """`like` gives type and device."""
        chunked: ChunkedTensor = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=like.dtype, device=like.device
        )
        chunked.chunks = {torch.Size(offsets): chunk for offsets, chunk in chunks if chunk.numel() or not chunk.ndim}
        return chunked

    @classmethod
    def of(cls, tensor: Tensor) -> ChunkedTensor:
        """This rank's part of a tensor: the shard of a DTensor, or all of any other tensor."""
        if isinstance(tensor, ChunkedTensor):
            return tensor
        shape, (offsets, local) = tensor.shape, local_chunk(tensor)
        return ChunkedTensor(local, shape, [(offsets, local)])

    def staged(self) -> ChunkedTensor:
        """A copy in CPU memory."""
        copies = ((tuple(offsets), chunk.detach().to("cpu", copy=True)) for offsets, chunk in self.chunks.items())
        return ChunkedTensor(torch.empty((), dtype=self.dtype), self.shape, copies)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch types its own as if nothing overrode it
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise TypeError(f"{operation} of a ChunkedTensor, which supports no computation")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, here={sum(b.numel() for b in self.chunks.values())})"

    # The protocol of torch.distributed.checkpoint for custom tensors (torch.distributed._checkpointable).

    def __create_write_items__(self, fqn: str, tensor: Any) -> list[WriteItem]:
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
        return [ChunkStorageMetadata(offsets=offsets, sizes=chunk.shape) for offsets, chunk in self.chunks.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None, "a chunk has offsets"
        return self.chunks[index.offset]


def local_chunk(tensor: Tensor) -> Chunk:
    """This rank's chunk of a tensor, sharing its memory."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tensor
    local = tensor.to_local()
    if not local.numel():
        return (0,) * tensor.ndim, local
    (chunk,) = tensor.__create_chunk_list__()
    return tuple(chunk.offsets), local
