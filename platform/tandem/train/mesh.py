"""How many ranks share what, and the named device mesh that comes of it. Axes go from outer to inner."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tandem.config import ParallelismConfig
from tandem.errors import LayoutError


@dataclass(frozen=True, kw_only=True, slots=True)
class Degrees:
    """Ranks along each axis of the mesh; the product is the number of workers."""

    dp_replicate: int = 1
    """Groups that hold the same parameters and see different rows."""
    dp_shard: int = 1
    """Ranks that share one copy of the parameters (FSDP2) and see different rows."""

    def __post_init__(self) -> None:
        for name, degree in dataclasses.asdict(self).items():
            if degree < 1:
                raise LayoutError(f"{name} is {degree}; a degree is at least 1.")

    @classmethod
    def of(cls, config: ParallelismConfig) -> Degrees:
        """The degrees that a config asks for."""
        if config.strategy == "ddp":
            return cls(dp_replicate=config.workers)
        return cls(dp_shard=config.workers)

    @property
    def world(self) -> int:
        """Workers needed."""
        return math.prod(dataclasses.astuple(self))

    @property
    def data_parallel(self) -> int:
        """Ranks that see different rows."""
        return self.dp_replicate * self.dp_shard

    def mesh(self, device_type: str, world_size: int) -> DeviceMesh:
        """The mesh over all ranks; needs the process group. LayoutError unless the degrees fit `world_size`."""
        if self.world != world_size:
            axes = " x ".join(f"{name}={n}" for name, n in dataclasses.asdict(self).items())
            raise LayoutError(f"{axes} needs {self.world} workers; there are {world_size}.")
        values: dict[str, Any] = dataclasses.asdict(self)
        return init_device_mesh(device_type, tuple(values.values()), mesh_dim_names=tuple(values))

    def data_rank(self, rank: int) -> int:
        """Which share of the rows a rank sees."""
        return rank % self.data_parallel
