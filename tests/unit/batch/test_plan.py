"""Rows in numbered pieces: every row in one piece, and in the same one whenever the input is read again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tandem.batch.plan import Divider, Mark, Piece, left, pieces_in_flight, rows_per_piece, units

ROWS = st.lists(st.sampled_from(["a@1", "b@1", None]), max_size=30)
FILES = st.lists(ROWS, max_size=4)


def divided(files: list[list[str | None]], size: int) -> list[Piece]:
    divider = Divider(size)
    found: list[Piece] = []
    for number, bases in enumerate(files):
        found += divider.pieces(number, ((Mark(100 * i, i), base) for i, base in enumerate(bases)))
    assert divider.rows == sum(map(len, files))
    return found


@given(FILES, st.integers(1, 7))
def test_every_row_is_in_one_piece_and_a_piece_in_one_file(files: list[list[str | None]], size: int) -> None:
    pieces = divided(files, size)
    assert [piece.number for piece in pieces] == list(range(len(pieces)))
    # Numbers run on through all files without a gap, and marks say where the first row of a piece begins.
    numbers = [number for piece in pieces for number in range(piece.first, piece.first + piece.rows)]
    assert numbers == list(range(sum(map(len, files))))
    starts = [sum(map(len, files[:number])) for number in range(len(files))]
    for piece in pieces:
        place = piece.first - starts[piece.source]
        assert piece.mark == Mark(100 * place, place)
        rows = files[piece.source][place : place + piece.rows]
        assert len(rows) == piece.rows <= size
        assert dict(piece.counts) == {base: rows.count(base) for base in rows if base is not None}


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
    assert sum(unit.piece.counts[["b@1", "a@1"][unit.base]] for unit in every) == asked


def test_names_sort_as_rows_do() -> None:
    pieces = divided([["a@1"] * 25], 2)
    names = [unit.name for unit in units(pieces, ["a@1"])]
    assert names == sorted(names) and len(names) == 13


def test_small_inputs_have_small_pieces_and_large_ones_not_too_many() -> None:
    assert rows_per_piece(10_000) == 64
    assert rows_per_piece(1 << 40) * 4096 * 512 * 8 > 1 << 30
    assert rows_per_piece(1 << 50) == 65_536


def test_the_window_is_full_while_a_piece_ends() -> None:
    for window in (1, 64, 2048):
        for rows in (1, 64, 4096):
            assert (pieces_in_flight(window, rows) - 1) * rows >= window
