"""Parallelism degrees and the named device mesh of a run. Axes go from outer to inner: pp, dp, ep, cp, tp."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tandem.config import ParallelismConfig
from tandem.errors import LayoutError


@dataclass(frozen=True, kw_only=True, slots=True)
class Degrees:
    """Ranks along each axis of the mesh; the product is the number of workers.

    Expert-parallel ranks see different rows, so ep is the inner part of dp_shard.
    """

    pp: int = 1
    """Pipeline stages."""
    dp_replicate: int = 1
    """Replicas of the parameters, which see different rows."""
    dp_shard: int = 1
    """Ranks that shard one copy of the parameters (FSDP2) and see different rows."""
    ep: int = 1
    """Ranks of dp_shard that share the experts of a mixture."""
    cp: int = 1
    """Ranks that share each sequence."""
    tp: int = 1
    """Ranks that share each matrix multiplication."""

    def __post_init__(self) -> None:
        for name, degree in dataclasses.asdict(self).items():
            if degree < 1:
                raise LayoutError(f"{name} is {degree}; a degree is at least 1.")
        if self.dp_shard % self.ep:
            raise LayoutError(f"ep ({self.ep}) must divide dp_shard ({self.dp_shard}).")

    @classmethod
    def of(cls, config: ParallelismConfig) -> Degrees:
        """The degrees that a config asks for."""
        if config.strategy == "ddp":
            return cls(dp_replicate=config.workers)
        return cls(
            pp=config.pipeline,
            dp_replicate=config.replicate,
            dp_shard=config.shard,
            ep=config.expert,
            cp=config.context,
            tp=config.tensor,
        )

    @property
    def world(self) -> int:
        """Workers needed."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def data_parallel(self) -> int:
        """Groups that see different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def token_parallel(self) -> int:
        """Ranks that see different tokens: over these the loss is summed and gradients are averaged."""
        return self.data_parallel * self.cp

    def mesh(self, device_type: str, world_size: int) -> Mesh:
        """The mesh over all ranks; needs the process group. LayoutError unless the degrees fit `world_size`."""
        if self.world != world_size:
            axes = " x ".join(f"{name}={n}" for name, n in dataclasses.asdict(self).items() if n > 1) or "one rank"
            raise LayoutError(f"{axes} needs {self.world} workers; there are {world_size}.")
        # dp_shard is dp_outer x ep.
        axes_and_sizes: dict[str, int] = {
            "pp": self.pp, "dp_replicate": self.dp_replicate, "dp_outer": self.dp_shard // self.ep, "ep": self.ep,
            "cp": self.cp, "tp": self.tp,
        }  # fmt: skip
        return Mesh(
            self, init_device_mesh(device_type, tuple(axes_and_sizes.values()), mesh_dim_names=tuple(axes_and_sizes))
        )

    def check_nodes(self, nodes: Sequence[str]) -> None:
        """Raise LayoutError if a tensor-parallel group spans nodes; `nodes` has the node of each rank."""
        for first in range(0, len(nodes), self.tp):
            group = nodes[first : first + self.tp]
            if len(set(group)) > 1:
                placements = "; ".join(
                    f"{_format_ranks(rank for rank, at in enumerate(nodes) if at == node)} on {node[:8]}"
                    for node in dict.fromkeys(nodes)
                )
                max_ranks_per_node = max(nodes.count(node) for node in set(nodes))
                fitting_tensor = next(n for n in range(min(self.tp - 1, max_ranks_per_node), 0, -1) if self.tp % n == 0)
                raise LayoutError(
                    f"parallel.tensor ({self.tp}) makes a group of ranks {first} to {first + self.tp - 1}, which Ray has put on "
                    f"{len(set(group))} nodes: {placements}. A tensor group exchanges every layer's activations, so it "
                    f"stays on one: lower parallel.tensor to {fitting_tensor}, or give each node room for a multiple of "
                    f"{self.tp} workers."
                )

    def data_rank(self, rank: int) -> int:
        """Index of the data-parallel group of a rank: pipeline, context and tensor peers see the same rows."""
        return rank // (self.cp * self.tp) % self.data_parallel


class Mesh:
    """The device mesh, with the axes that combine others."""

    def __init__(self, degrees: Degrees, device_mesh: DeviceMesh) -> None:
        self.degrees = degrees
        self.device_mesh = device_mesh
        self._shard = device_mesh["dp_outer", "ep", "cp"]._flatten("shard")
        self._expert_shard = device_mesh["dp_outer", "cp"]._flatten("expert_shard")

    def __getitem__(self, axis: str) -> DeviceMesh:
        """One axis: pp, dp_replicate, ep, cp or tp."""
        return self.device_mesh[axis]

    @property
    def parameters(self) -> DeviceMesh:
        """The mesh that parameters are sharded over, with an outer axis for replicas if there are any."""
        return self._add_replica_axis("shard", self._shard)

    @property
    def experts(self) -> DeviceMesh:
        """The same for experts, which ep has distributed already."""
        return self._add_replica_axis("expert_shard", self._expert_shard)

    @property
    def expert_tensor(self) -> DeviceMesh:
        """The mesh (ep, tp) that experts are split over."""
        return self.device_mesh["ep", "tp"]

    def _add_replica_axis(self, name: str, inner: DeviceMesh) -> DeviceMesh:
        if self.degrees.dp_replicate == 1:
            return inner
        return self.device_mesh["dp_replicate", name]


def _format_ranks(ranks: Iterable[int]) -> str:
    numbers = list(ranks)
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
