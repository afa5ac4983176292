"""Task of a training worker: the config, files and data of a job, pickled into each worker process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.config import TrainConfig
from tandem.data.stream import Stream


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """Input of every worker of an attempt."""

    config: TrainConfig
    job: Path
    """The job's folder."""
    base: Path | None
    """Folder of the base model."""
    base_id: str | None
    """Id of the base model in the registry."""
    reference: Path | None
    """Folder of DPO's reference model; None without DPO, and for adapters that are compared with their own base."""
    tokenizer: Path
    stream: Stream
    evaluation: Any
    """Ray object reference of the rows to evaluate on, or None."""
    mailbox: Any = None
    """Actor that takes events (see `tandem.train.supervision.mailbox`); each attempt has its own."""
    skipped_rows: tuple[tuple[int, int], ...] = ()
    """Row ranges that are skipped because the loss jumped after them: first row, and the one after the last."""

    @property
    def kind(self) -> str:
        """pretrain, sft or dpo."""
        return "dpo" if self.config.objective == "dpo" else "sft" if self.base else "pretrain"
