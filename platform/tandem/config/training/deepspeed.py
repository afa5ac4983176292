"""What DeepSpeed's ZeRO cuts, and what it keeps off the device."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.config import check
from tandem.errors import ConfigError

PLACES = ("none", "cpu", "nvme")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeedConfig:
    """ZeRO (Rajbhandari et al. 2020) with its offload; used by `parallel.strategy: deepspeed`."""

    stage: int = 3
    """What the workers share: 1 the optimizer's state, 2 gradients too, 3 parameters too (as fsdp2 does)."""
    offload_optimizer: str = "none"
    """Where the optimizer's state stays, and its step is computed: none (the device), cpu, or, with stage 3, nvme."""
    offload_parameters: str = "none"
    """With stage 3, where parameters stay that are not in use: none (the device), cpu or nvme."""
    nvme_path: str | None = None
    """Folder on each node's fast disk for what is offloaded to nvme."""

    def __post_init__(self) -> None:
        check.between("deepspeed.stage", self.stage, 1, 3)
        to_disk = []
        for key in ("offload_optimizer", "offload_parameters"):
            place = getattr(self, key)
            check.one_of(f"deepspeed.{key}", place, PLACES)
            if self.stage < 3 and (place == "nvme" or (place == "cpu" and key == "offload_parameters")):
                raise ConfigError(
                    f"deepspeed.{key} is {place!r}, which needs stage 3; deepspeed.stage is {self.stage}. Set it to 3, or "
                    f"{key} to {'cpu' if key == 'offload_optimizer' else 'none'}."
                )
            if place == "nvme":
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
