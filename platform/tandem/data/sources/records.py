"""Record readers: JSON lines, Parquet, Arrow of Hugging Face's `datasets`, and WebDataset shards.

A reader yields (location, record) for each record of a file, in order; `location` names the file and the position, for messages.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from tandem.data.sources.samples import KEYS
from tandem.data.tar import (
    READ_ERRORS,
    SUFFIXES,
    TEXT_EXTENSIONS,
    MemberError,
    TarSample,
    decode_fields,
    decompress_stream,
    foreign_samples,
)
from tandem.errors import DataError

Record = tuple[str, dict[str, Any]]
ROWS_AT_A_TIME = 1024
FIELD_EXTENSIONS = ("cls", "npy")
"""Members of a sample that become fields of its record under their extension."""


def reader_of(path: Path) -> Callable[[Path], Iterator[Record]] | None:
    """The reader for a file of that name; None if there is none."""
    for suffixes, reader in READERS.items():
        if path.name.endswith(suffixes):
            return reader
    return None


def json_lines(path: Path) -> Iterator[Record]:
    """A JSON object a line; blank lines are left out."""
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    yield f"{path} line {number}", _parse_object(raw, f"{path} line {number}")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def parquet(path: Path) -> Iterator[Record]:
    """The rows of a Parquet file; of its columns those that a sample can be made of."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in KEYS] or file.schema_arrow.names
            yield from _number_rows(path, file.iter_batches(batch_size=ROWS_AT_A_TIME, columns=columns))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}.") from error


def arrow(path: Path) -> Iterator[Record]:
    """The rows of an Arrow file or stream, of which `datasets` writes the latter."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            try:
                batches = iter(pa.ipc.open_stream(source))
            except pa.ArrowInvalid:
                file = pa.ipc.open_file(source)
                batches = (file.get_batch(number) for number in range(file.num_record_batches))
            yield from _number_rows(path, batches)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Arrow: {error}.") from error


def webdataset(path: Path) -> Iterator[Record]:
    """The samples of a WebDataset shard, compressed or not, as other tools write them too.

    KEY.json is a record, KEY.jsonl one a line, KEY.txt a text; KEY.cls (an int) and KEY.npy (an array) are fields of it.
    """
    try:
        with path.open("rb") as file:
            for sample in foreign_samples(decompress_stream(file)):
                yield from _sample_records(f"{path} sample {sample.key}", sample)
    except READ_ERRORS as error:
        raise DataError(f"{path} cannot be read as a tar file: {error}. Copy or download it again.") from error


READERS: dict[tuple[str, ...], Callable[[Path], Iterator[Record]]] = {
    (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"): json_lines,
    (".parquet",): parquet,
    (".arrow",): arrow,
    SUFFIXES: webdataset,
}


def saved_dataset(folder: Path) -> list[Path] | None:
    """The Arrow files of a folder that `save_to_disk` of Hugging Face's `datasets` wrote, in order; None if it is none.

    Of several splits it is `train`; DataError if there is no such one.
    """
    splits = folder / "dataset_dict.json"
    if splits.exists():
        names = _read_json(splits)["splits"]
        split = "train" if "train" in names else names[0] if len(names) == 1 else None
        if split is None:
            raise DataError(
                f"{folder} holds the splits {', '.join(names)} and no 'train'. Name one: {folder}/{names[0]}"
            )
        folder = folder / split
    state = folder / "state.json"
    if not state.exists():
        return None
    files = [folder / entry["filename"] for entry in _read_json(state).get("_data_files", [])]
    if missing := [file for file in files if not file.exists()]:
        raise DataError(f"{missing[0]} is missing, which {state} names. Save the dataset again.")
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}. Save the dataset again.") from error


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _parse_object(raw: bytes, location: str) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{location} is not UTF-8 (byte {error.start + 1}).") from error
    except ValueError as error:
        raise DataError(f"{location} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise DataError(f"{location} is a {type(value).__name__}; it must be a JSON object.")
    return value


def _number_rows(path: Path, batches: Iterator[Any]) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            number += 1
            yield f"{path} row {number}", record


def _sample_records(location: str, sample: TarSample) -> Iterator[Record]:
    try:
        values = decode_fields(sample.fields)
    except MemberError as error:
        raise DataError(f"{location} cannot be used: {error}. Correct it, or leave it out of the shard.") from error
    for number, line in enumerate(values.pop("jsonl", ()), 1):
        yield f"{location} line {number}", _parse_object(line, f"{location} line {number}")
    record = values.pop("json", {})
    if not isinstance(record, dict):
        raise DataError(f"{location} is a {type(record).__name__}; it must be a JSON object.")
    text = next((values[name] for name in TEXT_EXTENSIONS if name in values), None)
    if text is not None and not KEYS & record.keys():
        record["text"] = text
    for name in FIELD_EXTENSIONS:
        if name in values:
            record.setdefault(name, values[name])
    if record:
        yield location, record
