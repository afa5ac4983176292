"""A flat range of elements is saved and loaded as chunks of the global tensor."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from tandem.checkpoint.flat_chunks import FlatChunks, chunk_bounds


@given(st.data())
def test_chunks_cover_the_range_in_order(data: st.DataObject):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=4)))
    whole = torch.arange(math.prod(shape)).view(shape)
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(start, whole.numel()))
    found: list[int] = []
    for offsets, sizes in chunk_bounds(shape, start, stop):
        box = whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]
        assert box.shape == sizes
        found += box.flatten().tolist()
    assert found == list(range(start, stop))


def test_a_range_within_a_matrix_needs_at_most_three_chunks():
    assert list(chunk_bounds((4, 5), 3, 17)) == [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 2))]
    assert list(chunk_bounds((4, 5), 6, 8)) == [((1, 1), (1, 2))]
    assert list(chunk_bounds((4, 5), 0, 20)) == [((0, 0), (4, 5))]
    assert list(chunk_bounds((4, 5), 7, 7)) == []


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_flat_chunks_and_full_tensors_load_each_others_checkpoints(tmp_path: Path):
    whole = torch.randn(3, 4, 5)
    save({"w": FlatChunks(whole.flatten().clone(), whole.shape, 0)}, checkpoint_id=tmp_path, no_dist=True)
    found = {"w": torch.zeros(3, 4, 5)}
    load(found, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(found["w"], whole)

    part = FlatChunks(torch.zeros(30), whole.shape, 13)
    load({"w": part}, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(part.flat, whole.flatten()[13:43])


def test_a_chunked_tensor_supports_no_computation():
    with pytest.raises(TypeError, match="supports no computation"):
        FlatChunks(torch.zeros(3), (2, 5), 1).sum()
