"""Training data config: datasets, mixtures, packing, and the tasks that read them."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.config import check
from tandem.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class MixturePart:
    """One dataset of a mixture."""

    path: str
    """As data.path."""
    weight: float = 1.0
    """Its share of the rows, relative to the others' weights."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(
                f"data.mixture: the weight of {self.path!r} is {self.weight:g}; it must be above 0. Leave the dataset "
                "out instead."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Datasets that `tandem data build` wrote, and how their rows are cut."""

    path: str = ""
    """Folder of WebDataset shards with an index.json, its URI (s3://bucket/name), or the name of one below TANDEM_HOME/data."""
    mixture: tuple[MixturePart, ...] = ()
    """Instead of `path`: several datasets, whose rows are dealt by weight; a dataset that ends begins again."""
    sequence_length: int = 256
    """Tokens in a packed row."""
    shuffle: bool = True
    """Reorder shards, and the rows of each, every epoch, by the seed."""
    open_shards: int = 8
    """Shards of a dataset whose rows take turns: more mix better, and take more memory."""
    loss_on: str = "auto"
    """auto (answers where rows have them, else all), all, or answers."""
    readers: float = 0.25
    """CPUs that Ray reserves for each task that reads, tokenises and packs a shard."""
    reader_tasks: int = 2
    """Reader tasks at a time, at most."""
    read_ahead: int = 4
    """Packed shards that are ready before a rank requests them, at most."""
    prefetch_batches: int = 4
    """Batches that a rank's stream stays ahead of its training step."""
    skip_damaged: int = 0
    """Damaged shards that a run leaves out, naming each; one more stops it."""

    def __post_init__(self) -> None:
        if not self.path and not self.mixture:
            raise ConfigError("data.path is missing. Name a dataset, or several in data.mixture.")
        if self.path and self.mixture:
            raise ConfigError(
                f"data.path ({self.path!r}) and data.mixture ({len(self.mixture)} datasets) are both set. Unset one of them."
            )
        named = [part.path for part in self.mixture]
        if duplicate := next((name for name in named if named.count(name) > 1), None):
            raise ConfigError(f"data.mixture names {duplicate!r} twice. Name it once, with the sum of the weights.")
        check.at_least("data.sequence_length", self.sequence_length, 8)
        check.at_least("data.open_shards", self.open_shards, 1)
        check.one_of("data.loss_on", self.loss_on, ("auto", "all", "answers"))
        check.at_least("data.readers", self.readers, 0.01)
        check.at_least("data.reader_tasks", self.reader_tasks, 1)
        check.at_least("data.read_ahead", self.read_ahead, 1)
        check.at_least("data.prefetch_batches", self.prefetch_batches, 0)
        check.at_least("data.skip_damaged", self.skip_damaged, 0)

    @property
    def parts(self) -> tuple[MixturePart, ...]:
        """The datasets, of which there is one where `path` is set."""
        return self.mixture or (MixturePart(path=self.path),)
