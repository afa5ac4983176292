"""Decoding of packed rows for display: documents, their text, and the tokens that carry loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tandem.data.index import Part
from tandem.data.packing import IGNORED
from tandem.data.spec import Source
from tandem.data.tokenize import TextEncoder

SIDES = {3: ("",), 6: ("chosen", "rejected")}


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring tokens of a document that all carry loss, or all do not."""

    text: str
    tokens: int
    learned: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """A row of T tokens; of preferences there are two."""

    name: str
    """chosen or rejected; empty where there is one side."""
    ids: list[int]
    labels: list[int]
    positions: list[int]
    documents: list[list[Span]]
    padding: int
    """Number of padding tokens at the end."""

    @property
    def learned(self) -> int:
        """Tokens that carry loss."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectedRow:
    """A row and where it is from."""

    shard: str
    row: int
    """Its number among the shard's."""
    sides: list[Side]


def inspect_rows(part: Part, encoder: TextEncoder, *, length: int, loss_on_all: bool) -> Iterator[InspectedRow]:
    """The rows of a dataset in the order of its shards, packed as for training. DataError at a damaged shard."""
    source = Source.of(part, encoder, length=length, loss_on_all=loss_on_all)
    for number, path in enumerate(source.paths):
        for at, row in enumerate(source.rows(number)):
            names = SIDES[len(row)]
            sides = [_side(encoder, name, row[3 * n : 3 * n + 3]) for n, name in enumerate(names)]
            yield InspectedRow(shard=Path(path).name, row=at, sides=sides)


def _side(encoder: TextEncoder, name: str, row: npt.NDArray[np.int32]) -> Side:
    ids, labels, positions = row
    starts = [*np.flatnonzero(positions == 0).tolist(), len(ids)]
    bounds = list(itertools.pairwise(starts))
    first, end = bounds[-1]
    # Padding has positions like a document, and consists of the padding token only.
    padded = bool((ids[first:end] == encoder.pad_id).all() and (labels[first:end] == IGNORED).all())
    return Side(
        name=name,
        ids=ids.tolist(),
        labels=labels.tolist(),
        positions=positions.tolist(),
        documents=[_spans(encoder, ids[a:b], labels[a:b]) for a, b in (bounds[:-1] if padded else bounds)],
        padding=end - first if padded else 0,
    )


def _spans(encoder: TextEncoder, ids: npt.NDArray[np.int32], labels: npt.NDArray[np.int32]) -> list[Span]:
    carries_loss = labels != IGNORED
    cuts = [0, *(np.flatnonzero(np.diff(carries_loss)) + 1).tolist(), len(ids)]
    return [
        Span(encoder.tokenizer.decode(ids[a:b].tolist(), skip_special_tokens=False), b - a, bool(carries_loss[a]))
        for a, b in itertools.pairwise(cuts)
    ]
