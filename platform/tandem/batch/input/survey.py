"""Survey of the input before a run: row counts, models asked for, chunks, and invalid rows.

With the manifest of an earlier start it decides which chunks are left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.batch.files import Lines
from tandem.batch.input.plan import Chunk, Chunker, ChunkSize, Position, chunk_size
from tandem.batch.input.rows import BadRowError, RowRequest, UnknownFieldError, parse, read_row
from tandem.batch.input.sources import Row, rows_of
from tandem.batch.output.lines import failed
from tandem.errors import DataError, RegistryError
from tandem.ids import file_digest
from tandem.storage import Location, file_system


@dataclass(frozen=True, slots=True)
class Survey:
    """An input, read once."""

    files: tuple[Location, ...]
    digests: tuple[str, ...]
    chunks: tuple[Chunk, ...]
    bases: tuple[str, ...]
    """Ids of the base models that rows are for, in the order of the first row of each; of a run on an app the routes."""
    refused: Lines
    """The lines of rows that no engine is asked about."""
    rows: int
    size: ChunkSize
    """When a chunk is full."""
    bare_prompts: frozenset[str] = frozenset()
    """Ids of the bases that plain rows ask with a `prompt`, which no chat template is applied to."""


@dataclass(frozen=True, slots=True)
class Grouping:
    """Division of rows into groups that are published apart."""

    group_of: Callable[[RowRequest], str]
    """The group of a row; raises BadRowError or RegistryError for one that cannot be asked."""
    num_bytes: Callable[[RowRequest], int] | None = None
    """Bytes of a row for the size of a chunk; None: those of the row as it came."""


def survey(
    files: Sequence[Location],
    grouping: Grouping,
    request: Mapping[str, Any],
    size: ChunkSize | None = None,
    tell: Callable[[int], None] = lambda rows: None,
    *,
    chat: bool = False,
    check_values: bool = True,
) -> Survey:
    """Read all files; `tell` hears how many rows have come. `size` of a chunk unset: by the size of the input.

    `chat`: prompts of plain rows are messages. `check_values`: rows with values that no request can have are refused.

    Raises DataError if there are none, if a file is damaged, or if a row has a field that no request has.
    """
    size = size or chunk_size(input_bytes(files))
    divider = Chunker(size)
    bases: dict[str, None] = {}
    bare: set[str] = set()
    refused = Lines()
    chunks: list[Chunk] = []

    def asked(file: Location) -> Iterator[tuple[Position, int, str | None]]:
        for row in rows_of(file):
            num_bytes = len(row.raw)
            try:
                ask = _ask(row, request, chat, check_values)
                base: str | None = grouping.group_of(ask)
                if grouping.num_bytes is not None:
                    num_bytes = grouping.num_bytes(ask)
            except UnknownFieldError as error:
                raise DataError(f"{file} {row.where}: {error} Nothing has been started.") from None
            except (BadRowError, RegistryError) as error:
                base = None
                refused.add(failed(divider.rows, f"{file} {row.where}", str(error), row.raw).text)
            else:
                bases[str(base)] = None
                if ask.is_bare_prompt:
                    bare.add(str(base))
            yield row.position, num_bytes, base

    for number, file in enumerate(files):
        for chunk in divider.chunks(number, asked(file)):
            chunks.append(chunk)
            tell(divider.rows)
    if not divider.rows:
        raise DataError(f"{', '.join(map(str, files[:3]))} has no rows.")
    digests = tuple(_digest(file) for file in files)
    return Survey(tuple(files), digests, tuple(chunks), tuple(bases), refused, divider.rows, size, frozenset(bare))


def _ask(row: Row, request: Mapping[str, Any], chat: bool, check_values: bool) -> RowRequest:
    if row.problem is not None:
        raise BadRowError(row.problem)
    return read_row(parse(row.raw), request, chat=chat, check_values=check_values)


def input_bytes(files: Iterable[Location]) -> int:
    """Bytes of all files, as they are stored."""
    return sum(int(file_system(file).size(str(file)) or 0) for file in files)


def _digest(file: Location) -> str:
    """Of a local file sha256 of its bytes; of an object what its store tells versions apart by."""
    if isinstance(file, Path):
        return file_digest(file)
    return hashlib.sha256(str(file_system(file).ukey(file)).encode()).hexdigest()
