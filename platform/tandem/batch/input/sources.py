"""Input readers: JSON lines, Parquet and WebDataset shards, from the start or from a position.

A row that cannot be read is a row all the same, with the reason; a file that cannot be read is a DataError.
"""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from tandem.batch.files import reading
from tandem.batch.input.plan import Position
from tandem.data.index import SHARDS_NAME
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
from tandem.errors import DataError, did_you_mean, sentence
from tandem.storage import Location, base_name, file_system, is_remote, located, store_errors

PACKED = (".gz", ".tgz", ".zst")
NOT_ASKED = ("cls", "npy")
"""Extensions of members that no request has a field for."""
ROWS_AT_A_TIME = 256


class Row(NamedTuple):
    """A row as it was found."""

    position: Position
    where: str
    """For a person: line 3, row 3, sample KEY."""
    raw: bytes
    """Its JSON; of one that cannot be read as such what there is."""
    problem: str | None = None


Reader = Callable[[IO[bytes], Position], Iterator[Row]]


def find_files(source: str) -> list[Location]:
    """The files that `source` names, in the order of their names: itself, those of a folder, or what fits a pattern with *.

    Raises DataError if there are none, or of a sort that nothing here reads, and StorageError where the store refuses.
    """
    place = located(source)
    with store_errors(place, "read"):
        return _find_files(source, place)


def _find_files(source: str, place: Location) -> list[Location]:
    files = file_system(place)
    text = str(place)
    if files.isdir(text):
        # A dataset that `tandem data build` made has its shards in a folder of their own.
        shards = f"{text}/{SHARDS_NAME}"
        folder = shards if files.isdir(shards) else text
        found = [p for p in files.ls(folder, detail=False) if _reader(base_name(p)) is not None]
    elif files.exists(text):
        found = [text]
    elif set("*?[") & set(text):
        found = files.glob(text)
    else:
        raise DataError(f"No input at {source}.{_near(place)} Give a file of rows ({_known()}), or a folder of such.")
    if not found:
        raise DataError(f"{source} holds no file of rows. Known are {_known()}.")
    for name in found:
        if _reader(base_name(name)) is None:
            raise DataError(f"{name} is of a sort that is not read here. Known are {_known()}.")
    return sorted((located(files.unstrip_protocol(p)) if is_remote(place) else Path(p) for p in found), key=str)


def rows_of(file: Location, position: Position = Position()) -> Iterator[Row]:  # noqa: B008 - a tuple
    """The rows of a file from `position` on."""
    import pyarrow as pa

    reader = _reader(base_name(str(file)))
    assert reader is not None, "find_files gives only files that have one"
    try:
        with _opened(file) as stream:
            yield from reader(stream, position)
    except (*READ_ERRORS, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read: {error}.") from error


def only_forward(file: Location) -> bool:
    """Whether reading from a position on means reading much of what is before it."""
    return str(file).endswith((*PACKED, ".parquet"))


def json_lines(file: IO[bytes], position: Position) -> Iterator[Row]:
    """An object a line; blank lines are none."""
    offset, number, _ = position
    file.seek(offset)
    for line in file:
        begins = Position(offset, number)
        offset, number = offset + len(line), number + 1
        if text := line.strip():
            yield Row(begins, f"line {number}", text)


def parquet(file: IO[bytes], position: Position) -> Iterator[Row]:
    """A row a row; row groups before the position are not read."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        group, number = 0, 0
        while group < len(sizes) and number + sizes[group] <= position.place:
            number += sizes[group]
            group += 1
        if group == len(sizes):
            return
        for batch in table.iter_batches(ROWS_AT_A_TIME, row_groups=range(group, len(sizes))):
            # What is before the position is not made into Python's values, which takes longer than reading it.
            before = min(max(0, position.place - number), batch.num_rows)
            number += before
            for record in batch.slice(before).to_pylist():
                yield _recorded(Position(0, number), f"row {number + 1}", _without_nulls(record))
                number += 1


def webdataset(file: IO[bytes], position: Position) -> Iterator[Row]:
    """A sample a row: KEY.json is the row, KEY.txt its prompt; or a row a line of KEY.jsonl.

    A row has its key as custom_id unless it has one of its own. Labels and arrays (.cls, .npy) are no part of a request.
    """
    place, inside = position.place, position.inside
    for sample in foreign_samples(file, position.offset):
        for row in _of_sample(Position(sample.offset, place - inside), sample):
            if row.position.inside < inside:
                continue
            yield row
            place += 1
        inside = 0


READERS: dict[tuple[str, ...], Reader] = {
    (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"): json_lines,
    (".parquet",): parquet,
    SUFFIXES: webdataset,
}


def _reader(name: str) -> Reader | None:
    return next((reader for suffixes, reader in READERS.items() if name.endswith(suffixes)), None)


def _known() -> str:
    return ", ".join(suffix for suffixes in READERS for suffix in suffixes)


def _near(place: Location) -> str:
    if isinstance(place, Path) and place.parent.is_dir():
        # Only what could be read would help.
        return did_you_mean(place.name, [p.name for p in place.parent.iterdir() if p.is_dir() or _reader(p.name)])
    return ""


@contextlib.contextmanager
def _opened(file: Location) -> Iterator[IO[bytes]]:
    with reading(file) as raw:
        if str(file).endswith(SUFFIXES):
            yield decompress_stream(raw)
        elif str(file).endswith(PACKED):
            yield cast(IO[bytes], gzip.GzipFile(fileobj=raw, mode="rb"))
        else:
            yield raw


def _of_sample(position: Position, sample: TarSample) -> Iterator[Row]:
    fields = {name: data for name, data in sample.fields.items() if name.removesuffix(".gz") not in NOT_ASKED}
    where, key = f"sample {sample.key}", sample.key.removeprefix("./")
    try:
        values = decode_fields(fields)
    except MemberError as error:
        yield Row(position, where, fields[error.extension], sentence(f"I{str(error)[1:]}"))
        return
    lines = values.pop("jsonl", [])
    for number, line in enumerate(lines):
        begins = Position(position.offset, position.place + number, number)
        yield Row(begins, f"{where} line {number + 1}", line)
    if values or not lines:
        begins = Position(position.offset, position.place + len(lines), len(lines))
        yield _sample(begins, where, key, values)


def _sample(position: Position, where: str, key: str, values: dict[str, Any]) -> Row:
    record = values.get("json", {})
    if not isinstance(record, dict):
        raw = json.dumps(record).encode()
        return Row(position, where, raw, f"It is a {type(record).__name__}; a row is a JSON object.")
    text = next((values[name] for name in TEXT_EXTENSIONS if name in values), None)
    if text is not None and not record.keys() & {"prompt", "messages", "input", "body"}:
        record["prompt"] = text
    if not record:
        return Row(position, where, b"", "The sample has nothing in a .json, .jsonl or .txt.")
    return _recorded(position, where, {"custom_id": key, **record})


def _recorded(position: Position, where: str, record: dict[str, Any]) -> Row:
    try:
        return Row(position, where, json.dumps(record, ensure_ascii=False, allow_nan=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        return Row(position, where, repr(record).encode(), f"It has a value that JSON has no form for: {error}.")


def _without_nulls(value: Any) -> Any:
    """A column that a row does not use is null in it, in structs too."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
