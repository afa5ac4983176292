"""The data to train on."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.config import check


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """A dataset that `tandem data build` wrote, and how its rows are cut."""

    path: str
    """Folder of WebDataset shards with an index.json, or the name of one below TANDEM_HOME/data."""
    sequence_length: int = 256
    """Tokens in a packed row."""
    shuffle: bool = True
    """Reorder the shards each epoch, by the seed."""
    loss_on: str = "auto"
    """auto (answers where rows have them, else all), all, or answers."""
    readers: float = 0.25
    """CPUs that Ray reserves for each task that reads, tokenises and packs a shard."""
    prefetch_batches: int = 4
    """Batches that a rank's stream stays ahead of its training step."""

    def __post_init__(self) -> None:
        check.at_least("data.sequence_length", self.sequence_length, 8)
        check.one_of("data.loss_on", self.loss_on, ("auto", "all", "answers"))
        check.at_least("data.readers", self.readers, 0.01)
        check.at_least("data.prefetch_batches", self.prefetch_batches, 0)
