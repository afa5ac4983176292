"""Parallelism degrees multiply to the number of workers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.config import ParallelismConfig
from tandem.errors import LayoutError
from tandem.train.parallel.mesh import Degrees


def test_ddp_replicates_and_fsdp2_shards_the_data_axis():
    assert Degrees.of(ParallelismConfig(workers=4, strategy="ddp")) == Degrees(dp_replicate=4)
    assert Degrees.of(ParallelismConfig(workers=4, strategy="fsdp2")) == Degrees(dp_shard=4)


def test_degrees_multiply():
    degrees = Degrees(dp_replicate=2, dp_shard=3)
    assert (degrees.world, degrees.data_parallel) == (6, 6)
    assert [degrees.data_rank(r) for r in range(6)] == list(range(6))


@given(
    st.fixed_dictionaries({axis: st.integers(1, 3) for axis in ("pp", "dp_replicate", "ep", "cp", "tp")}),
    st.integers(1, 3),
)
def test_only_pipeline_context_and_tensor_peers_share_a_data_rank(sizes: dict[str, int], outer: int):
    degrees = Degrees(**sizes, dp_shard=outer * sizes["ep"])
    axes = (sizes["pp"], sizes["dp_replicate"], outer, sizes["ep"], sizes["cp"], sizes["tp"])
    # The places of ranks on the mesh, as `Degrees.mesh` lays it: experts are shared by ranks that see different rows.
    places = dict(enumerate(itertools.product(*map(range, axes))))
    seen: dict[int, set[tuple[int, ...]]] = {}
    for rank, (_, replicate, part, expert, _, _) in places.items():
        seen.setdefault(degrees.data_rank(rank), set()).add((replicate, part, expert))
    assert sorted(seen) == list(range(degrees.data_parallel))
    assert all(len(found) == 1 for found in seen.values())


def test_degrees_that_do_not_fit_are_refused_with_the_numbers():
    with pytest.raises(LayoutError, match="dp_replicate=2 x dp_shard=3 needs 6 workers; there are 4"):
        Degrees(dp_replicate=2, dp_shard=3).mesh("cpu", 4)
    with pytest.raises(LayoutError, match="dp_shard is 0"):
        Degrees(dp_shard=0)


@pytest.mark.parametrize("nodes", ["aaaa", "aabb", "bbaa"])
def test_tensor_groups_within_nodes_are_accepted(nodes: str):
    Degrees(dp_shard=2, tp=2).check_nodes(nodes)


def test_a_tensor_group_across_nodes_is_refused_with_the_ranks_of_each_node():
    with pytest.raises(
        LayoutError,
        match=r"tensor \(2\) makes a group of ranks 2 to 3.* 2 nodes: ranks 0, 1, 2 on one; rank 3 on two\."
        r".* lower parallel\.tensor to 1, or give each node room for a multiple of 2 workers",
    ):
        Degrees(dp_shard=2, tp=2).check_nodes(["one", "one", "one", "two"])
    with pytest.raises(LayoutError, match=r"lower parallel\.tensor to 2"):
        Degrees(tp=4).check_nodes(["one", "one", "two", "two"])


def test_other_groups_may_span_nodes():
    Degrees(pp=2, dp_shard=2).check_nodes(["one", "two", "three", "four"])
