"""Sequence packing: documents of any length into rows of one length, with their boundaries kept. Pure.

A row is three int32 vectors of T: ids; labels, -100 at tokens without loss (padding, prompts, and the first token of a
document, which has no predecessor); positions, which restart at 0 with each document, so that attention masked by them never
crosses a boundary (transformers builds that mask from the positions if it gets no other).

A row of preferences is two such rows, one after the other: ids, labels and positions of chosen answers, then of rejected
ones. Each side has the same number of documents, prompts included; the n-th of one side is the pair of the n-th of the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tandem.data.tokenize import Encoded

IGNORED = -100
Rows = npt.NDArray[np.int32]
"""[rows, 3, T]: ids, labels, positions; of preferences [rows, 6, T]."""


class RowSource(Protocol):
    """The rows of one rank."""

    def take(self, count: int) -> Rows:
        """The next `count` rows: [count, 3, T] int32 (ids, labels, positions), or [count, 6, T] of preferences."""
        ...


def pack(documents: Iterable[Encoded], length: int, pad_id: int, *, split: bool) -> Rows:
    """Rows of `length` tokens.

    `split`: a document goes on in the next row (text). Otherwise it stays whole in the first row with room (pairs), or is
    cut at `length` if it is longer than a row; what would carry no loss then is left out. Rows without any loss are dropped.
    """
    if split:
        return split_rows(documents, length, pad_id)
    packed = [_row(parts, length, pad_id) for parts in fit_rows(documents, length)]
    rows_with_loss = [row for row in packed if (row[1] != IGNORED).any()]
    return np.stack(rows_with_loss) if rows_with_loss else np.empty((0, 3, length), np.int32)


def split_rows(documents: Iterable[Encoded], length: int, pad_id: int) -> Rows:
    """Rows filled to the last token; a document goes on in the next row. Rows without any loss are left out."""
    documents = list(documents)
    sizes = np.array([len(document.ids) for document in documents], np.int64)
    total = int(sizes.sum())
    rows = np.empty((3, -(-total // length) * length), np.int32)
    ids, labels, positions = rows
    ids[total:] = pad_id
    ids[:total] = np.fromiter(itertools.chain.from_iterable(document.ids for document in documents), np.int32, total)
    is_target = np.zeros(rows.shape[1], np.bool_)
    is_target[:total] = np.fromiter(
        itertools.chain.from_iterable(document.targets for document in documents), np.bool_, total
    )
    # The rest of a document in a new row is a document of its own: tokens of the row before cannot be attended to.
    starts = np.zeros(rows.shape[1] + 1, np.bool_)
    starts[np.cumsum(sizes)] = True
    starts[::length] = True
    starts = starts[:-1]
    at = np.arange(rows.shape[1])
    positions[:] = at - np.maximum.accumulate(np.where(starts, at, 0))
    labels[:] = np.where(is_target & ~starts, ids, IGNORED)
    packed = rows.reshape(3, -1, length).transpose(1, 0, 2)
    return np.ascontiguousarray(packed[(packed[:, 1] != IGNORED).any(axis=1)])


def fit_rows(documents: Iterable[Encoded], length: int) -> list[list[Encoded]]:
    """Rows of whole documents, each in the first row with room; documents without loss are left out."""
    rows = first_fit(((_truncate(document, length),) for document in documents), length)
    return [[document for (document,) in row] for row in rows]


def pack_preferences(pairs: Iterable[tuple[Encoded, Encoded]], length: int, pad_id: int) -> Rows:
    """Rows [n, 6, T] of pairs (chosen, rejected), each whole in the first row with room for it on both sides.

    A side longer than a row is cut at `length`. A pair is left out if a side then has no token with loss, or if both sides
    are the same.
    """
    truncated = ((_truncate(chosen, length), _truncate(rejected, length)) for chosen, rejected in pairs)
    rows = first_fit(((chosen, rejected) for chosen, rejected in truncated if chosen.ids != rejected.ids), length)
    packed = [np.concatenate([_row([pair[side] for pair in row], length, pad_id) for side in (0, 1)]) for row in rows]
    return np.stack(packed) if packed else np.empty((0, 6, length), np.int32)


def first_fit(bundles: Iterable[tuple[Encoded, ...]], length: int) -> list[list[tuple[Encoded, ...]]]:
    """Bundles of one document for each side of a row (one or two), put into the first row where each side has room for its own.

    Bundles in which a document has no loss are left out.
    """
    rows: list[list[tuple[Encoded, ...]]] = []
    free_tokens: list[list[int]] = []
    first_open = 0
    for bundle in bundles:
        sizes = [len(document.ids) for document in bundle]
        if not all(any(document.targets[1:]) for document in bundle):
            continue
        for number in range(first_open, len(rows)):
            free = free_tokens[number]
            # One side or two: the first and the last are all of them, and a generator here made packing 3 times slower.
            if free[0] >= sizes[0] and free[-1] >= sizes[-1]:
                rows[number].append(bundle)
                free_tokens[number] = [tokens - size for tokens, size in zip(free, sizes, strict=True)]
                break
        else:
            rows.append([bundle])
            free_tokens.append([length - size for size in sizes])
        # Looking back further than this many rows costs more than it fills.
        first_open = max(first_open, len(rows) - 64)
    return rows


def _truncate(document: Encoded, length: int) -> Encoded:
    return Encoded(document.ids[:length], document.targets[:length])


def _row(documents: list[Encoded], length: int, pad_id: int) -> Rows:
    row = np.empty((3, length), np.int32)
    at = 0
    for document in documents:
        end = at + len(document.ids)
        row[0, at:end] = document.ids
        row[1, at:end] = np.where(document.targets, row[0, at:end], IGNORED)
        row[1, at] = IGNORED
        row[2, at:end] = np.arange(end - at)
        at = end
    row[0, at:] = pad_id
    row[1, at:] = IGNORED
    row[2, at:] = np.arange(length - at)
    return row
