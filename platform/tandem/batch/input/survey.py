"""Survey of the input before a run: row counts, models asked for, chunks, and invalid rows.

With the manifest of an earlier start it decides which chunks are left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.batch.files import Lines
from tandem.batch.input.plan import Divider, Mark, Piece, PieceSize, piece_size
from tandem.batch.input.rows import Ask, BadRowError, UnknownFieldError, parse, read_row
from tandem.batch.input.sources import Row, rows_of
from tandem.batch.models import Names
from tandem.batch.output.lines import failed
from tandem.errors import DataError, RegistryError
from tandem.ids import file_digest
from tandem.storage import Location, file_system


@dataclass(frozen=True, slots=True)
class Survey:
    """An input, read once."""

    files: tuple[Location, ...]
    digests: tuple[str, ...]
    pieces: tuple[Piece, ...]
    bases: tuple[str, ...]
    """Ids of the base models that rows are for, in the order of the first row of each."""
    refused: Lines
    """The lines of rows that no engine is asked about."""
    rows: int
    size: PieceSize
    """When a piece is full."""
    bare_prompts: frozenset[str] = frozenset()
    """Ids of the bases that plain rows ask with a `prompt`, which no chat template is applied to."""


def survey(
    files: Sequence[Location],
    names: Names,
    request: Mapping[str, Any],
    size: PieceSize | None = None,
    tell: Callable[[int], None] = lambda rows: None,
    *,
    chat: bool = False,
) -> Survey:
    """Read all files; `tell` hears how many rows have come. `size` of a piece unset: by the size of the input.

    `chat`: prompts of plain rows are messages.

    Raises DataError if there are none, if a file is damaged, or if a row has a field that no request has.
    """
    size = size or piece_size(sum(_size(file) for file in files))
    divider = Divider(size)
    bases: dict[str, None] = {}
    bare: set[str] = set()
    refused = Lines()
    pieces: list[Piece] = []

    def asked(file: Location) -> Iterator[tuple[Mark, int, str | None]]:
        for row in rows_of(file):
            try:
                ask = _ask(row, request, chat)
                base: str | None = names.find(ask.model).base.id
            except UnknownFieldError as error:
                raise DataError(f"{file} {row.where}: {error} Nothing has been started.") from None
            except (BadRowError, RegistryError) as error:
                base = None
                refused.add(failed(divider.rows, f"{file} {row.where}", str(error), row.raw).text)
            else:
                bases[str(base)] = None
                if ask.is_bare_prompt:
                    bare.add(str(base))
            yield row.mark, len(row.raw), base

    for number, file in enumerate(files):
        for piece in divider.pieces(number, asked(file)):
            pieces.append(piece)
            tell(divider.rows)
    if not divider.rows:
        raise DataError(f"{', '.join(map(str, files[:3]))} has no rows.")
    digests = tuple(_digest(file) for file in files)
    return Survey(tuple(files), digests, tuple(pieces), tuple(bases), refused, divider.rows, size, frozenset(bare))


def _ask(row: Row, request: Mapping[str, Any], chat: bool) -> Ask:
    if row.problem is not None:
        raise BadRowError(row.problem)
    return read_row(parse(row.raw), request, chat=chat)


def _size(file: Location) -> int:
    return int(file_system(file).size(str(file)) or 0)


def _digest(file: Location) -> str:
    """Of a local file sha256 of its bytes; of an object what its store tells versions apart by."""
    if isinstance(file, Path):
        return file_digest(file)
    return hashlib.sha256(str(file_system(file).ukey(file)).encode()).hexdigest()
