"""A run of a tensor's elements, saved and loaded as boxes of the whole tensor.

ZeRO cuts flat buffers anywhere, also in the middle of a matrix's row. torch.distributed.checkpoint knows boxes only; a run in
row-major order is a few of them: the end of a row, whole rows, the beginning of a row. So written, a checkpoint does not tell how
its tensors were cut, and any other strategy or number of workers can read it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of boxes that hold the elements `start..stop` of a row-major tensor, in that order."""
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    inner = tuple(shape[1:])
    row = math.prod(inner)
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        yield from _in_row(inner, first, head, tail)
        return
    if head:
        yield from _in_row(inner, first, head, row)
        first += 1
    if first < last:
        yield (first, *(0 for _ in inner)), (last - first, *inner)
    yield from _in_row(inner, last, 0, tail)


def _in_row(
    inner: tuple[int, ...], row: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offsets, sizes in boxes(inner, start, stop):
        yield (row, *offsets), (1, *sizes)


class Pieces(torch.Tensor):
    """Stands for a tensor of `shape`, of which this rank has the elements of `flat`, from the element `start` on.

    What torch.distributed.checkpoint saves of it, or loads, is `flat`, in place. Nothing can be computed with it.
    """

    flat: Tensor
    _parts: dict[torch.Size, Tensor]

    @staticmethod
    def __new__(cls, flat: Tensor, shape: Sequence[int], start: int) -> Pieces:
        """`flat`: one axis, contiguous."""
        made: Pieces = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=flat.dtype, device=flat.device)
        made.flat = flat
        made._parts = {}
        taken = 0
        for offsets, sizes in boxes(shape, start, start + flat.numel()):
            count = math.prod(sizes)
            made._parts[torch.Size(offsets)] = flat.narrow(0, taken, count).view(sizes)
            taken += count
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch types its own as if nothing overrode it
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise TypeError(f"{operation} of a tensor that is there in part only")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pieces(shape={tuple(self.shape)}, here={self.flat.numel()})"

    # torch.distributed.checkpoint asks these three of any tensor that has them (torch.distributed._checkpointable).

    def __create_write_items__(self, fqn: str, held: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties(dtype=self.flat.dtype), size=self.shape
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=at, sizes=part.shape) for at, part in self._parts.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None, "what is in part has offsets"
        return self._parts[index.offset]
