"""Batch API config: share of the engines that batches take."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.config import check


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchesConfig:
    """Batches of `/v1/batches`, whose requests take the capacity that interactive traffic leaves."""

    enabled: bool = True
    """Whether clients can create batches, and whether this app's gateways send their requests."""
    max_concurrent: int = 256
    """Requests of batches that one gateway has under way, at most."""
    share: float = 0.5
    """Share of a model's slots that batches take, at most, while clients have requests under way; without these they take all."""
    slowdown: float = 1.25
    """How many times as long tokens may take while batches run beside clients' requests: where their share would slow
    the engine down by more, they take fewer slots."""
    max_active: int = 100
    """Batches of one tenant that have not ended, at most."""
    max_attempts: int = 3
    """Attempts for a request whose gateway or engine was lost."""

    def __post_init__(self) -> None:
        check.at_least("gateway.batches.max_concurrent", self.max_concurrent, 1)
        check.between("gateway.batches.share", self.share, 0.01, 1.0)
        check.between("gateway.batches.slowdown", self.slowdown, 1.01, 100.0)
        check.at_least("gateway.batches.max_active", self.max_active, 1)
        check.between("gateway.batches.max_attempts", self.max_attempts, 1, 100)
