"""DeepSpeed config: ZeRO stage and offload."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.config import check
from tandem.errors import ConfigError

OFFLOAD_DEVICES = ("none", "cpu", "nvme")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeedConfig:
    """ZeRO (Rajbhandari et al. 2020) with its offload; used by `parallel.strategy: deepspeed`."""

    stage: int = 3
    """Sharded state: 1 optimizer state, 2 also gradients, 3 also parameters (as fsdp2 does)."""
    offload_optimizer: str = "none"
    """Device of the optimizer state and step: none (the worker's device), cpu, or nvme (with stage 3)."""
    offload_parameters: str = "none"
    """With stage 3, device of parameters that are not in use: none (the worker's device), cpu or nvme."""
    nvme_path: str | None = None
    """Folder on each node's fast disk for offload to nvme."""

    def __post_init__(self) -> None:
        check.between("deepspeed.stage", self.stage, 1, 3)
        to_disk = []
        for key in ("offload_optimizer", "offload_parameters"):
            device = getattr(self, key)
            check.one_of(f"deepspeed.{key}", device, OFFLOAD_DEVICES)
            if self.stage < 3 and (device == "nvme" or (device == "cpu" and key == "offload_parameters")):
                raise ConfigError(
                    f"deepspeed.{key} is {device!r}, which needs stage 3; deepspeed.stage is {self.stage}. Set it to 3, or "
                    f"{key} to {'cpu' if key == 'offload_optimizer' else 'none'}."
                )
            if device == "nvme":
                to_disk.append(key)
        if to_disk and self.nvme_path is None:
            raise ConfigError(
                f"deepspeed.{to_disk[0]} is 'nvme', but deepspeed.nvme_path is not set. Set it to a folder on a fast local disk."
            )
        if self.nvme_path is not None and not to_disk:
            raise ConfigError(
                f"deepspeed.nvme_path is {self.nvme_path!r}, but nothing is offloaded to it. Set offload_optimizer or "
                "offload_parameters to 'nvme', or unset nvme_path."
            )
