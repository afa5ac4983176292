"""Rows in numbered chunks: every row in one chunk, and in the same one whenever the input is read again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tandem.batch.input.plan import (
    Chunk,
    Chunker,
    ChunkSize,
    Position,
    chunk_size,
    chunks_in_flight,
    left,
    read_together,
    units,
)

ROWS = st.lists(st.sampled_from(["a@1", "b@1", None]), max_size=30)
FILES = st.lists(ROWS, max_size=4)


def divided(files: list[list[str | None]], size: int, most_bytes: int | None = None) -> list[Chunk]:
    """Row number i of a file begins at byte 100 i, and has i bytes."""
    divider = Chunker(ChunkSize(size, most_bytes))
    found: list[Chunk] = []
    for number, bases in enumerate(files):
        found += divider.chunks(number, ((Position(100 * i, i), i, base) for i, base in enumerate(bases)))
    assert divider.rows == sum(map(len, files))
    return found


@given(FILES, st.integers(1, 7), st.none() | st.integers(1, 60))
def test_every_row_is_in_one_piece_and_a_piece_in_one_file(
    files: list[list[str | None]], size: int, most_bytes: int | None
) -> None:
    chunks = divided(files, size, most_bytes)
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    # Numbers run on through all files without a gap, and marks say where the first row of a chunk begins.
    numbers = [number for chunk in chunks for number in range(chunk.first, chunk.first + chunk.rows)]
    assert numbers == list(range(sum(map(len, files))))
    starts = [sum(map(len, files[:number])) for number in range(len(files))]
    for chunk in chunks:
        place = chunk.first - starts[chunk.source]
        assert chunk.position == Position(100 * place, place)
        rows = files[chunk.source][place : place + chunk.rows]
        assert len(rows) == chunk.rows <= size
        # Only a chunk's last row may be one too many.
        assert most_bytes is None or sum(range(place, place + chunk.rows - 1)) < most_bytes
        assert dict(chunk.counts) == {base: rows.count(base) for base in rows if base is not None}


@given(FILES, st.integers(1, 7), st.data())
def test_what_is_left_and_what_is_published_are_all_rows_that_somebody_is_asked(
    files: list[list[str | None]], size: int, data: st.DataObject
) -> None:
    every = units(divided(files, size), ["b@1", "a@1"])
    names = [unit.name for unit in every]
    assert len(set(names)) == len(names)
    published = data.draw(st.sets(st.sampled_from(names))) if names else set()
    todo = left(every, published)
    assert {unit.name for unit in todo} | published == set(names)
    assert not {unit.name for unit in todo} & published
    asked = sum(base is not None for bases in files for base in bases)
    assert sum(unit.chunk.counts[["b@1", "a@1"][unit.base]] for unit in every) == asked


def test_names_sort_as_rows_do() -> None:
    chunks = divided([["a@1"] * 25], 2)
    names = [unit.name for unit in units(chunks, ["a@1"])]
    assert names == sorted(names) and len(names) == 13


def test_tasks_read_units_of_one_file_and_all_of_one_that_is_read_from_its_start() -> None:
    every = units(divided([["a@1"] * 150, ["a@1"] * 150, ["a@1"]], 1), ["a@1"])
    tasks = read_together(every, lambda source: source == 1)
    assert [unit for task in tasks for unit in task] == every
    assert [(task[0].chunk.source, len(task)) for task in tasks] == [(0, 64), (0, 64), (0, 22), (1, 150), (2, 1)]


def test_small_inputs_have_small_pieces_and_large_ones_not_too_many() -> None:
    assert chunk_size(10_000) == ChunkSize(64, 4 << 20)
    # About 4,096 chunks, whether the rows are short or long.
    assert chunk_size(1 << 36) == ChunkSize(1 << 15, 16 << 20)
    assert chunk_size(1 << 50) == ChunkSize(65_536, 64 << 20)


def test_a_piece_of_long_rows_is_cut_by_its_bytes() -> None:
    rows = [(Position(100_000 * i, i), 100_000, "a@1") for i in range(100)]
    assert [chunk.rows for chunk in Chunker(chunk_size(10_000_000)).chunks(0, rows)] == [42, 42, 16]


def test_the_window_is_full_while_a_piece_ends() -> None:
    for window in (1, 64, 2048):
        for rows in (1, 64, 4096):
            assert (chunks_in_flight(window, rows) - 1) * rows >= window


def test_pieces_of_long_rows_are_given_out_only_as_they_fit_into_memory() -> None:
    assert chunks_in_flight(2048, 10, 4 << 20) == 206
    assert chunks_in_flight(2048, 1, 4 << 20) == 256
    assert chunks_in_flight(2048, 6, 64 << 20) == 16
