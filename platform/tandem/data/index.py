"""The index of a dataset folder: what `tandem data build` wrote, with counts and digests. Needs no heavy import."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tandem.errors import DataError
from tandem.storage import write_atomic

FILE = "index.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One WebDataset archive."""

    name: str
    """Relative to the dataset's `shards` folder."""
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetIndex:
    """What is in a dataset folder."""

    kind: Literal["text", "pairs"]
    samples: int
    shards: tuple[ShardEntry, ...]
    digest: str
    """sha256 over the shards and the tokenizer: equal digests give equal rows."""
    source: str
    tokenizer_digest: str
    created: str
    """ISO 8601, UTC."""

    @classmethod
    def load(cls, folder: Path) -> DatasetIndex:
        """Read the index of `folder`; DataError if there is none, or if it is not one."""
        try:
            values: dict[str, Any] = json.loads((folder / FILE).read_text())
            shards = tuple(ShardEntry(**entry) for entry in values.pop("shards"))
            index = cls(shards=shards, **values)
        except FileNotFoundError as error:
            raise DataError(f"{folder} has no {FILE}: it is not a dataset. Make one with `tandem data build`.") from error
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{folder / FILE} is damaged ({error}). Build the dataset again with `tandem data build`.") from error
        if not index.samples or not index.shards:
            raise DataError(f"{folder} has no rows. Build it again from a source that has some.")
        return index

    def save(self, folder: Path) -> None:
        """Write the index of `folder`."""
        write_atomic(folder / FILE, json.dumps(asdict(self), indent=1))

    def shard_paths(self, folder: Path) -> list[Path]:
        """The archives, in order."""
        return [folder / "shards" / shard.name for shard in self.shards]
