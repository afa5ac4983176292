"""Flat ranges of a tensor's elements, saved and loaded as rectangular chunks of the global tensor.

ZeRO splits flat buffers anywhere, also within a row of a matrix. A range in row-major order consists of a few chunks: the end
of a row, whole rows, the beginning of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import cast

from torch import Tensor

from tandem.checkpoint.chunks import Chunk, ChunkedTensor


def chunk_bounds(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of the chunks that hold the elements `start..stop` of a row-major tensor, in that order."""
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    inner = tuple(shape[1:])
    row = math.prod(inner)
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        yield from _chunks_in_row(inner, first, head, tail)
        return
    if head:
        yield from _chunks_in_row(inner, first, head, row)
        first += 1
    if first < last:
        yield (first, *(0 for _ in inner)), (last - first, *inner)
    yield from _chunks_in_row(inner, last, 0, tail)


def _chunks_in_row(
    inner: tuple[int, ...], row: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offsets, sizes in chunk_bounds(inner, start, stop):
        yield (row, *offsets), (1, *sizes)


class FlatChunks(ChunkedTensor):
    """A global tensor of `shape`, of which this rank has the elements of `flat`, starting at element `start`."""

    flat: Tensor

    @staticmethod
    def __new__(cls, flat: Tensor, shape: Sequence[int], start: int) -> FlatChunks:
        """`flat`: contiguous, with one axis."""
        chunks = cast(FlatChunks, ChunkedTensor.__new__(cls, flat, shape, _views(flat, shape, start)))
        chunks.flat = flat
        return chunks


def _views(flat: Tensor, shape: Sequence[int], start: int) -> Iterator[Chunk]:
    start_in_flat = 0
    for offsets, sizes in chunk_bounds(shape, start, start + flat.numel()):
        count = math.prod(sizes)
        yield offsets, flat.narrow(0, start_in_flat, count).view(sizes)
        start_in_flat += count
