"""Restart history of a training run: the facts between two attempts that the restart policy decides by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tandem.config import SpikeConfig, TrainConfig
from tandem.observability.events import Event, RolledBack


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """Input of `tandem.train.supervision.policy.decide`, next to the outcome of the last attempt."""

    max_failures: int
    """Failures in a row without a new checkpoint that a run survives."""
    spike: SpikeConfig
    last_step: int = 0
    """Last step that the workers reported."""
    checkpoint_step: int | None = None
    """Step of the newest checkpoint; None without one."""
    checkpoint_rows: int = 0
    """Rows of the stream that the newest checkpoint has consumed."""
    stop_requested: bool = False
    failures: int = 0
    """Failures in a row without a new checkpoint in between."""
    failed_at_step: int = -1
    """Step of the newest checkpoint at the last failure; -1 before the first."""
    waiting_for_capacity: bool = False
    """Whether the last attempt found no room for its workers."""
    skipped_rows: tuple[tuple[int, int], ...] = ()
    """Row ranges that are skipped because the loss jumped after them: first row, and the one after the last."""

    @classmethod
    def of(cls, config: TrainConfig, events: Iterable[Event]) -> RunHistory:
        """The history at the start of a driver, from the events of earlier ones."""
        return cls(
            max_failures=config.checkpoint.max_failures,
            spike=config.faults.spike or SpikeConfig(),
            skipped_rows=tuple(event.rows for event in events if isinstance(event, RolledBack)),
        )
