"""Division of input rows into numbered chunks, and selection of the unfinished ones. Pure.

A row's number is its place in the input: files by name, rows as they stand. A chunk is a run of rows of one file, and what is
published in one step. So a resumed run knows from the names of published units which ones remain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

LEAST_ROWS, MOST_ROWS = 64, 65_536
"""Of a chunk, where nobody has said how many."""
LEAST_BYTES, MOST_BYTES = 4 << 20, 64 << 20
"""Of its rows together, then: a chunk of long rows has fewer."""
FLIGHT_BYTES = 1 << 30
"""Of the chunks that an engine is given at once."""
PIECES = 4096
"""Approximate number of chunks of an input."""
UNITS_A_TASK = 64
"""That one task reads, of a file that can be read from anywhere on."""
ROW_BYTES = 512
"""Of a row, about: how many there are is not known before they are read."""


class Position(NamedTuple):
    """Where a row begins in its file."""

    offset: int = 0
    """Bytes before it, of the file unpacked; 0 in a file that is read by rows."""
    place: int = 0
    """Lines, rows or samples before it."""
    inside: int = 0
    """Rows before it in the same sample of a tar file, which has several if it has a .jsonl."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows that are published together."""

    number: int
    source: int
    """The file that they are in, by its place among the input's."""
    first: int
    """The number of the first row."""
    rows: int
    position: Position
    """Where that row begins."""
    counts: Mapping[str, int]
    """How many of the rows each base model is asked; the others are refused."""


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """A chunk's rows for one base: what is published under one name."""

    chunk: Chunk
    base: int
    """Its place among the run's bases."""

    @property
    def name(self) -> str:
        """Sorts as the rows do."""
        return f"{self.chunk.number:08d}-{self.base}.jsonl"


@dataclass(frozen=True, slots=True)
class ChunkSize:
    """When a chunk is full: at the first of both."""

    rows: int
    bytes: int | None = None
    """Of its rows together, the last one excepted; None: however many."""


class Chunker:
    """Divides rows into chunks as they come."""

    def __init__(self, size: ChunkSize) -> None:
        self._size = size
        self._number = 0
        self._first = 0
        self.rows = 0
        """Rows that have come."""

    def chunks(self, source: int, rows: Iterable[tuple[Position, int, str | None]]) -> Iterator[Chunk]:
        """The chunks of a file; of each row where it begins, its bytes, and the base that it is for (None: refused)."""
        counts: Counter[str] = Counter()
        position, chunk_rows, chunk_bytes = Position(), 0, 0
        for begins, row_bytes, base in rows:
            if not chunk_rows:
                position = begins
            chunk_rows, chunk_bytes = chunk_rows + 1, chunk_bytes + row_bytes
            self.rows += 1
            if base is not None:
                counts[base] += 1
            if chunk_rows == self._size.rows or (self._size.bytes is not None and chunk_bytes >= self._size.bytes):
                yield self._cut(source, chunk_rows, position, counts)
                chunk_rows, chunk_bytes, counts = 0, 0, Counter()
        if chunk_rows:
            yield self._cut(source, chunk_rows, position, counts)

    def _cut(self, source: int, rows: int, position: Position, counts: Counter[str]) -> Chunk:
        chunk = Chunk(self._number, source, self._first, rows, position, dict(counts))
        self._number += 1
        self._first += rows
        return chunk


def chunk_size(input_bytes: int) -> ChunkSize:
    """How large a chunk is, where nobody has said it."""
    return ChunkSize(
        max(LEAST_ROWS, min(MOST_ROWS, input_bytes // ROW_BYTES // PIECES)),
        max(LEAST_BYTES, min(MOST_BYTES, input_bytes // PIECES)),
    )


def units(chunks: Iterable[Chunk], bases: Iterable[str]) -> list[WorkUnit]:
    """What there is to publish: a unit for each chunk and base that has rows in it, base by base."""
    every = list(chunks)
    return [WorkUnit(chunk, i) for i, base in enumerate(bases) for chunk in every if chunk.counts.get(base)]


def left(all_units: Iterable[WorkUnit], published: Collection[str]) -> list[WorkUnit]:
    """Those that are not published yet, in their order."""
    return [unit for unit in all_units if unit.name not in published]


def read_together(todo: Iterable[WorkUnit], only_forward: Callable[[int], bool]) -> list[list[WorkUnit]]:
    """What each task reads: units of one file, all of them where it can be read from its start only (`only_forward`)."""
    tasks: list[list[WorkUnit]] = []
    for unit in todo:
        source = unit.chunk.source
        if tasks and tasks[-1][0].chunk.source == source and (only_forward(source) or len(tasks[-1]) < UNITS_A_TASK):
            tasks[-1].append(unit)
        else:
            tasks.append([unit])
    return tasks


def chunks_in_flight(window_rows: int, rows: int, chunk_bytes: int | None = None) -> int:
    """Number of chunks that an engine is given at once: one more than fill its window, because one is always ending.

    Fewer where the rows are so long that these would not fit into its node's memory.
    """
    most = FLIGHT_BYTES // chunk_bytes if chunk_bytes else window_rows + 1
    return max(2, min(-(-window_rows // rows) + 1, most))
