"""Packing tasks: from samples to rows, and from a shard to a block of rows."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tandem.data.index import Kind, Part
from tandem.data.packing import Rows, pack, pack_preferences
from tandem.data.shards import samples_in
from tandem.data.sources.samples import Chat, Pair, Preference, Sample, Text
from tandem.data.tar import READ_ERRORS
from tandem.data.tokenize import Encoded, TextEncoder
from tandem.errors import DataError, StorageError
from tandem.storage import Location, file_system, is_remote, store_errors

READ_AGAIN_S = (0.5, 2.0, 8.0)
"""Pauses after which a shard that could not be read is tried again."""


@dataclass(frozen=True, kw_only=True)
class PackSpec:
    """Parameters for packing samples into rows."""

    encoder: TextEncoder
    kind: Kind
    length: int
    loss_on_all: bool

    @property
    def row_shape(self) -> tuple[int, int]:
        """(3, T), or (6, T) of preferences."""
        return (6 if self.kind == "preferences" else 3), self.length

    def rows(self, samples: Iterable[Sample]) -> Rows:
        """The rows of one shard's samples, which are of this kind."""
        if self.kind == "preferences":
            return pack_preferences(self._preferences(samples), self.length, self.encoder.pad_id)
        return pack(self._documents(samples), self.length, self.encoder.pad_id, split=self.kind == "text")

    def lengths(self, samples: Iterable[Sample]) -> Iterator[int]:
        """Tokens of each document; of a preference those of its longer side."""
        if self.kind == "preferences":
            return (max(len(chosen.ids), len(rejected.ids)) for chosen, rejected in self._preferences(samples))
        return (len(document.ids) for document in self._documents(samples))

    def _documents(self, samples: Iterable[Sample]) -> Iterator[Encoded]:
        encoder = self.encoder
        match self.kind:
            case "text":
                return encoder.texts([s.text for s in samples if isinstance(s, Text)])
            case "pairs":
                pairs = [(s.prompt, s.answer) for s in samples if isinstance(s, Pair)]
                return encoder.pairs(pairs, loss_on_all=self.loss_on_all)
            case _:
                chats = [[asdict(message) for message in s.messages] for s in samples if isinstance(s, Chat)]
                return encoder.chats(chats, loss_on_all=self.loss_on_all)

    def _preferences(self, samples: Iterable[Sample]) -> Iterator[tuple[Encoded, Encoded]]:
        chosen_and_rejected = [
            ([asdict(turn) for turn in s.turns], s.chosen, s.rejected) for s in samples if isinstance(s, Preference)
        ]
        return self.encoder.preferences(chosen_and_rejected)


@dataclass(frozen=True, kw_only=True)
class Source:
    """The shards of one dataset, and how they are packed."""

    spec: PackSpec
    paths: tuple[str, ...]
    bytes: tuple[int, ...]
    """Size of each shard."""
    digests: tuple[str, ...]
    """sha256 of each shard."""

    @classmethod
    def of(cls, part: Part, encoder: TextEncoder, *, length: int, loss_on_all: bool) -> Source:
        """The shards of a part."""
        index = part.index
        return cls(
            spec=PackSpec(encoder=encoder, kind=index.kind, length=length, loss_on_all=loss_on_all),
            paths=tuple(str(path) for path in index.shard_paths(part.location)),
            bytes=tuple(shard.bytes for shard in index.shards),
            digests=tuple(shard.sha256 for shard in index.shards),
        )

    def only(self, shard: int) -> Source:
        """One of its shards."""
        selection = slice(shard, shard + 1)
        return replace(self, paths=self.paths[selection], bytes=self.bytes[selection], digests=self.digests[selection])

    def rows(self, shard: int) -> Rows:
        """The packed rows of a shard; DataError names it if its bytes are not those that were written."""
        path = self.paths[shard]
        rebuild_hint = "Build the dataset again: `tandem data build`."
        try:
            data = read_shard(path)
            if hashlib.sha256(data).hexdigest() != self.digests[shard]:
                raise DataError(
                    f"{path} is damaged: its bytes are not those that index.json has the digest of. {rebuild_hint}"
                )
            return self.spec.rows(samples_in(io.BytesIO(data)))
        except StorageError as error:
            raise DataError(str(error)) from error
        except (*READ_ERRORS, ValueError, KeyError) as error:
            raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}. {rebuild_hint}") from error


def read_shard(path: Location) -> bytes:
    """The bytes of a shard, at a path or URI. OSError or StorageError if it cannot be read, also when that is tried again."""
    # A shard that is left out changes the order of rows after it: a short outage of the storage must not do that.
    for pause in (*READ_AGAIN_S, None):
        try:
            return _read(path)
        except (OSError, StorageError):
            if pause is None:
                raise
            time.sleep(pause)
    raise AssertionError("the last time returns or raises")


def _read(path: Location) -> bytes:
    if not is_remote(path):
        return Path(path).read_bytes()
    # Stores' clients have errors of their own for a connection that fails.
    with store_errors(path, "read"):
        content: bytes = file_system(path).cat_file(path)
    return content


def pack_shards(shards: list[Source]) -> Iterator[pa.Table]:
    """A table of one line for each of these sources, which are of one shard, see `block_of`."""
    for shard in shards:
        try:
            yield block_of(shard.rows(0), shard.paths[0])
        except DataError as error:
            # Reported to the rank that uses the rows: one damaged shard must not end the tasks that read others.
            yield block_of(np.empty((0, *shard.spec.row_shape), np.int32), shard.paths[0], str(error))


class PackedBlock(NamedTuple):
    """The content of a block."""

    rows: Rows
    """Not copied."""
    shard: str
    """The path of the shard that they are from."""
    error: str
    """The reason why the shard could not be read; empty if it was."""


def block_of(rows: npt.NDArray[np.int32], shard: str, error: str = "") -> pa.Table:
    """Rows as a table of one line, their bytes in one buffer, so that they are read without a copy."""
    offsets = pa.py_buffer(np.array([0, rows.nbytes], np.int64))
    packed = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(np.ascontiguousarray(rows))])
    metadata = {"sides": [rows.shape[1]], "length": [rows.shape[2]], "shard": [shard], "error": [error]}
    return pa.table({"rows": packed, **metadata})


def rows_of(block: pa.Table) -> PackedBlock:
    """The rows in a block."""
    num_vectors, length, shard, error = (block[name][0].as_py() for name in ("sides", "length", "shard", "error"))
    flat_rows = np.frombuffer(block["rows"][0].as_buffer(), np.int32)
    return PackedBlock(flat_rows.reshape(-1, num_vectors, length), shard, error)
