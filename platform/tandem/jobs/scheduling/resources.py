"""Amounts of CPUs and GPUs. Fractions are allowed, as in Ray; comparisons ignore differences below `TOLERANCE`."""

from __future__ import annotations

import math
from dataclasses import dataclass

TOLERANCE = 1e-6
"""Amounts that differ by less are equal; Ray counts in steps of 1e-4."""


@dataclass(frozen=True, slots=True)
class Resources:
    """CPUs and GPUs of a node, a worker or a tenant."""

    cpus: float = 0.0
    gpus: float = 0.0

    def __add__(self, other: Resources) -> Resources:
        return Resources(self.cpus + other.cpus, self.gpus + other.gpus)

    def __sub__(self, other: Resources) -> Resources:
        return Resources(self.cpus - other.cpus, self.gpus - other.gpus)

    def __mul__(self, count: float) -> Resources:
        return Resources(self.cpus * count, self.gpus * count)

    def least(self, other: Resources) -> Resources:
        """The smaller amount of each."""
        return Resources(min(self.cpus, other.cpus), min(self.gpus, other.gpus))

    def fits_in(self, other: Resources) -> bool:
        """Whether `other` has at least these amounts."""
        return self.cpus <= other.cpus + TOLERANCE and self.gpus <= other.gpus + TOLERANCE

    def share_of(self, capacity: Resources) -> float:
        """The dominant share: the larger of the two shares of `capacity` (Ghodsi et al., NSDI 2011)."""
        cpu_share = self.cpus / capacity.cpus if capacity.cpus > 0 else 0.0
        gpu_share = self.gpus / capacity.gpus if capacity.gpus > 0 else 0.0
        return max(cpu_share, gpu_share)

    @property
    def is_empty(self) -> bool:
        """Whether both amounts are 0."""
        return self.cpus < TOLERANCE and self.gpus < TOLERANCE

    def __str__(self) -> str:
        parts = [
            f"{amount:g} {name if math.isclose(amount, 1) else name + 's'}"
            for amount, name in ((self.gpus, "GPU"), (self.cpus, "CPU"))
            if amount > TOLERANCE
        ]
        return " and ".join(parts) or "nothing"
