"""Degrees multiply to the workers, and say so when they do not."""

from __future__ import annotations

import pytest

from tandem.config import ParallelismConfig
from tandem.errors import LayoutError
from tandem.train.mesh import Degrees


def test_a_strategy_is_a_place_on_the_mesh():
    assert Degrees.of(ParallelismConfig(workers=4, strategy="ddp")) == Degrees(dp_replicate=4)
    assert Degrees.of(ParallelismConfig(workers=4, strategy="fsdp2")) == Degrees(dp_shard=4)


def test_degrees_multiply():
    degrees = Degrees(dp_replicate=2, dp_shard=3)
    assert (degrees.world, degrees.data_parallel) == (6, 6)
    assert [degrees.data_rank(r) for r in range(6)] == list(range(6))


def test_degrees_that_do_not_fit_are_refused_with_the_numbers():
    with pytest.raises(LayoutError, match="dp_replicate=2 x dp_shard=3 needs 6 workers; there are 4"):
        Degrees(dp_replicate=2, dp_shard=3).mesh("cpu", 4)
    with pytest.raises(LayoutError, match="dp_shard is 0"):
        Degrees(dp_shard=0)
