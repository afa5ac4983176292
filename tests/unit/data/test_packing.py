"""Rows keep every token and every boundary."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tandem.data.packing import IGNORED, pack, pack_preferences
from tandem.data.tokenize import Encoded

PAD = 0
documents = st.lists(
    st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=30).map(
        lambda tokens: Encoded([i for i, _ in tokens], [t for _, t in tokens])
    ),
    max_size=20,
)


def whole(*ids: int) -> Encoded:
    return Encoded(list(ids), [True] * len(ids))


def test_text_runs_on_from_row_to_row():
    rows = pack([whole(1, 2, 3), whole(4, 5, 6, 7)], 4, PAD, split=True)
    assert rows[:, 0].tolist() == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert rows[:, 2].tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]


def test_no_loss_is_taken_across_a_boundary_or_at_padding():
    rows = pack([whole(1, 2, 3), whole(4, 5, 6, 7)], 4, PAD, split=True)
    assert rows[:, 1].tolist() == [[-100, 2, 3, -100], [-100, 6, 7, -100]]


def test_pairs_stay_whole_and_fill_rows_with_room():
    rows = pack([whole(1, 2, 3), whole(4, 5, 6), whole(7, 8)], 5, PAD, split=False)
    assert rows[:, 0].tolist() == [[1, 2, 3, 7, 8], [4, 5, 6, 0, 0]]


def test_a_pair_longer_than_a_row_is_cut_and_left_out_if_its_answer_is_gone():
    late = Encoded([1, 2, 3, 4, 5, 6], [False] * 5 + [True])
    early = Encoded([1, 2, 3, 4, 5, 6], [False] * 2 + [True] * 4)
    rows = pack([late, early], 4, PAD, split=False)
    assert rows[:, 0].tolist() == [[1, 2, 3, 4]]
    assert rows[:, 1].tolist() == [[-100, -100, 3, 4]]


def test_nothing_gives_no_rows():
    assert pack([], 8, PAD, split=True).shape == (0, 3, 8)
    assert pack([Encoded([1], [True])], 8, PAD, split=True).shape == (0, 3, 8)


@given(documents, st.integers(2, 16))
def test_text_keeps_every_token_in_order_and_every_boundary(found: list[Encoded], length: int):
    # With loss on all no row is left out, but one that holds a single token and padding.
    found = [whole(*document.ids) for document in found]
    expected, tokens = list[list[int]](), [(i, n == 0) for document in found for n, i in enumerate(document.ids)]
    for at in range(0, len(tokens), length):
        part = tokens[at : at + length]
        if any(not starts for _, starts in part[1:]):
            expected.append([i for i, _ in part] + [PAD] * (length - len(part)))
    rows = pack(found, length, PAD, split=True)
    assert rows[:, 0].tolist() == expected


@given(documents, st.integers(2, 40), st.booleans())
def test_labels_are_ids_or_ignored_and_never_at_a_first_token(found: list[Encoded], length: int, split: bool):
    rows = pack(found, length, PAD, split=split)
    assert rows.dtype == np.int32 and rows.shape[1:] == (3, length)
    ids, labels, positions = rows[:, 0], rows[:, 1], rows[:, 2]
    assert ((labels == IGNORED) | (labels == ids)).all()
    assert (labels[positions == 0] == IGNORED).all()
    assert (labels[ids == PAD] == IGNORED).all()
    assert (positions[:, 0] == 0).all()
    steps = np.diff(positions, axis=1)
    assert ((steps == 1) | (positions[:, 1:] == 0)).all()
    assert (labels != IGNORED).any(axis=1).all()


def reply(*ids: int) -> Encoded:
    """A prompt of one token, 9, and an answer."""
    return Encoded([9, *ids], [False] + [True] * len(ids))


def test_a_pair_of_answers_is_in_one_row_side_by_side():
    rows = pack_preferences([(reply(1, 2), reply(3)), (reply(4), reply(5, 6))], 6, PAD)
    assert rows.tolist() == [
        [
            [9, 1, 2, 9, 4, 0], [-100, 1, 2, -100, 4, -100], [0, 1, 2, 0, 1, 0],
            [9, 3, 9, 5, 6, 0], [-100, 3, -100, 5, 6, -100], [0, 1, 0, 1, 2, 0],
        ]
    ]  # fmt: skip


def test_a_pair_goes_where_both_sides_have_room():
    first, wide, narrow = (reply(1, 2), reply(3)), (reply(4), reply(5, 6, 7)), (reply(8), reply(7))
    rows = pack_preferences([first, wide, narrow], 5, PAD)
    assert rows[:, 0].tolist() == [[9, 1, 2, 9, 8], [9, 4, 0, 0, 0]]
    assert rows[:, 3].tolist() == [[9, 3, 9, 7, 0], [9, 5, 6, 7, 0]]


def test_a_pair_without_a_difference_or_an_answer_within_a_row_is_left_out():
    late = Encoded([9] * 5 + [1], [False] * 5 + [True])
    alike = (reply(1, 2, 3, 4), reply(1, 2, 3, 5))
    assert pack_preferences([(late, reply(1)), (reply(1), late), alike], 4, PAD).shape == (0, 6, 4)


answers = st.lists(st.integers(1, 8), min_size=1, max_size=12).map(lambda ids: reply(*ids))


@given(st.lists(st.tuples(answers, answers), max_size=20), st.integers(4, 20))
def test_both_sides_of_a_row_hold_the_same_pairs_in_order(pairs: list[tuple[Encoded, Encoded]], length: int):
    rows = pack_preferences(pairs, length, PAD)
    found = []
    for row in rows:
        sides = []
        for ids, labels, positions in (row[:3], row[3:]):
            starts = [*np.flatnonzero(positions == 0), length]
            spans = [slice(a, b) for a, b in itertools.pairwise(starts)]
            sides.append([ids[s].tolist() for s in spans if (labels[s] != IGNORED).any()])
        assert len(sides[0]) == len(sides[1])
        found += [(tuple(a), tuple(b)) for a, b in zip(*sides, strict=True)]
    cut = [(tuple(a.ids[:length]), tuple(b.ids[:length])) for a, b in pairs]
    assert sorted(found) == sorted((a, b) for a, b in cut if a != b)
