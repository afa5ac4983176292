"""Dataset index (index.json): shards, digests and statistics of a dataset. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tandem.config import DataConfig
from tandem.errors import DataError, StorageError, did_you_mean
from tandem.ids import digest
from tandem.settings import settings
from tandem.storage import (
    Location,
    base_name,
    file_system,
    is_remote,
    join,
    located,
    publish_folder,
    store_errors,
)

Kind = Literal["text", "pairs", "chats", "preferences"]
INDEX_NAME = "index.json"
SHARDS_NAME = "shards"
TOKENIZER_NAME = "tokenizer"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """One WebDataset tar."""

    name: str
    samples: int
    bytes: int
    """Size of the file."""
    sha256: str
    characters: int = 0
    """Of its samples' texts; 0 in an index of an older Tandem."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetIndex:
    """A dataset: its shards in order, and what they were made from."""

    kind: Kind
    """text (KEY.txt), or KEY.json: pairs (prompt and answer), chats (messages), preferences (prompt, chosen and rejected)."""
    samples: int
    shards: tuple[ShardInfo, ...]
    digest: str
    """sha256 over the kind and the shards' contents: equal data, equal digest."""
    source: str
    tokenizer_digest: str
    created: str
    """UTC, ISO 8601."""

    @classmethod
    def load(cls, folder: Path, location: Location | None = None) -> DatasetIndex:
        """The index of the dataset in `folder`; DataError if it is missing, damaged, or names shards that are not there.

        `location`: of the shards; None: the same folder.
        """
        path = folder / INDEX_NAME
        try:
            values: Any = json.loads(path.read_text())
            shards = tuple(ShardInfo(**shard) for shard in values.pop("shards"))
            index = cls(shards=shards, **values)
        except FileNotFoundError as error:
            raise DataError(
                f"{folder} is not a dataset: it holds no {INDEX_NAME}. Make one with `tandem data build SOURCE NAME`."
            ) from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{path} is damaged ({type(error).__name__}: {error}). Build the dataset again: `tandem data build`."
            ) from error
        where = join(folder if location is None else location, SHARDS_NAME)
        sizes = _file_sizes(where)
        for shard in index.shards:
            size = sizes.get(shard.name)
            if size != shard.bytes:
                state = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
                raise DataError(f"{join(where, shard.name)} {state}. Build the dataset again: `tandem data build`.")
        return index

    def to_json(self) -> str:
        """The text of index.json."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def shard_paths(self, location: Location) -> list[Location]:
        """The shards' files, in order; `location`: the dataset's folder or URI."""
        return [join(location, SHARDS_NAME, shard.name) for shard in self.shards]

    @property
    def characters(self) -> int:
        """Of all texts."""
        return sum(shard.characters for shard in self.shards)

    @property
    def total_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.bytes for shard in self.shards)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """An existing dataset, and its share of a mixture."""

    folder: Path
    """Folder with its index and tokenizer; of a dataset in an object store a copy of these."""
    index: DatasetIndex
    location: Location
    """Folder or URI with its shards."""
    weight: float = 1.0
    """Relative to the other parts' weights."""


def find_parts(config: DataConfig) -> tuple[Part, ...]:
    """The datasets that a config names; DataError if one is missing, or if two are one."""
    parts: list[Part] = []
    for named in config.parts:
        found = find_dataset(named.path)
        if any(part.location == found.location for part in parts):
            raise DataError(f"data.mixture names {found.location} twice. Name it once, with the sum of the weights.")
        parts.append(replace(found, weight=named.weight))
    return tuple(parts)


def check_tokenizers(parts: tuple[Part, ...]) -> None:
    """Raise DataError unless all parts have the same tokenizer: a model that comes without one takes theirs."""
    first = parts[0]
    for part in parts[1:]:
        if part.index.tokenizer_digest != first.index.tokenizer_digest:
            raise DataError(
                f"{part.folder} has another tokenizer than {first.folder}, and a new model needs one. Build it with the other's "
                f"(`tandem data build SOURCE NAME --tokenizer {first.folder.name}`), or set model.tokenizer."
            )


def find_dataset(path: str) -> Part:
    """A dataset, by path, by URI, or by its name below TANDEM_HOME/data; DataError with the nearest name.

    Raises StorageError where an object store does not answer.
    """
    if is_remote(path):
        location = str(located(path))
        folder = _copy_of_metadata(location)
        return Part(folder=folder, index=DatasetIndex.load(folder, location), location=location)
    data_dir, by_name = settings().data_dir, "/" not in path
    folder = data_dir / path if by_name and (data_dir / path).is_dir() else Path(path).expanduser().resolve()
    if folder.is_file():
        raise DataError(f"{path} is a file, not a dataset. Make a dataset of it: `tandem data build {path} NAME`.")
    if not folder.is_dir():
        dataset_names = (
            sorted(p.name for p in data_dir.iterdir() if (p / INDEX_NAME).is_file()) if data_dir.is_dir() else []
        )
        location = (
            f"{path!r}: there is neither {data_dir / path} nor the folder {folder}" if by_name else f"at {folder}"
        )
        raise DataError(
            f"No dataset {location}.{did_you_mean(Path(path).name, dataset_names)} "
            f"Make one: `tandem data build SOURCE NAME` (known here: {', '.join(dataset_names) or 'none'})."
        )
    return Part(folder=folder, index=DatasetIndex.load(folder), location=folder)


def _copy_of_metadata(uri: str) -> Path:
    """A folder below TANDEM_HOME with the index and tokenizer of a dataset in an object store, as they are now."""
    with store_errors(uri, "read"):
        files = file_system(uri)
        try:
            index = files.cat_file(str(join(uri, INDEX_NAME)))
        except FileNotFoundError as error:
            raise DataError(
                f"{uri} is not a dataset: it holds no {INDEX_NAME}. Copy a whole folder that `tandem data build` has made there."
            ) from error
        # By its content: a dataset that is replaced has another copy.
        folder = settings().root / "cache" / "datasets" / digest([uri, index.decode("utf-8", "replace")])[:32]
        if not folder.is_dir():
            try:
                with publish_folder(folder) as staging:
                    (staging / INDEX_NAME).write_bytes(index)
                    files.get(str(join(uri, TOKENIZER_NAME)), str(staging / TOKENIZER_NAME), recursive=True)
            except StorageError:
                if not folder.is_dir():  # another process has made the same
                    raise
    return folder


def _file_sizes(location: Location) -> dict[str, int]:
    """Bytes of each file of a folder or URI, by name; none where it is not there."""
    if isinstance(location, Path):
        return {file.name: file.stat().st_size for file in location.iterdir()} if location.is_dir() else {}
    with store_errors(location, "read"):
        try:
            entries = file_system(location).ls(location, detail=True)
        except FileNotFoundError:
            return {}
    return {base_name(entry["name"]): int(entry["size"]) for entry in entries if entry["type"] == "file"}


def parts_digest(parts: tuple[Part, ...]) -> str:
    """The digest of the datasets' contents and weights; of one dataset, its own."""
    if len(parts) == 1:
        return parts[0].index.digest
    return digest([[part.index.digest, part.weight] for part in parts])


def content_digest(kind: str, shards: tuple[ShardInfo, ...]) -> str:
    """The digest of a dataset with these shards."""
    return digest([kind, [[shard.name, shard.sha256] for shard in shards]])
