"""Shards to packed rows by Ray Data, and packed rows to each data-parallel rank, in the order of `tandem.data.order`.

A dataset whose packed rows fit in a quarter of the object store is read, tokenised and packed once; ranks then take rows
from shared memory. A larger one is streamed: every lane reads its shards ahead of the training step.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from tandem.config import DataConfig
from tandem.data.corpus import Pair, Preference, Sample, Text
from tandem.data.index import DatasetIndex, Kind
from tandem.data.order import Lane, held_rows, lane_count, lanes_of
from tandem.data.packing import Rows, RowSource, pack, pack_preferences
from tandem.data.shards import decode_json
from tandem.data.tokenize import TextEncoder
from tandem.errors import DataError

HELD_SHARE = 0.25
"""Share of the object store that held rows may take."""
TASK_BYTES = 8 * 2**20
"""Bytes of shards for one reading task: starting a process costs about as much as tokenising this much."""
PACKED_PER_BYTE = 4.0
"""Bytes of packed rows for each byte of text, about: 12 for a token of 3 to 4 characters."""


@dataclass(frozen=True, kw_only=True)
class PackSpec:
    """How samples become rows."""

    encoder: TextEncoder
    kind: Kind
    length: int
    loss_on_all: bool

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Tokenise and pack the samples of one or several shards; rows never mix shards."""
        paths = np.asarray(batch["path"])
        rows = [self._shard(batch, np.flatnonzero(paths == path)) for path in dict.fromkeys(paths.tolist())]
        return {"row": np.concatenate(rows) if rows else self.rows([])}

    def _shard(self, batch: dict[str, Any], members: Any) -> Rows:
        if self.kind == "text":
            return self.rows([Text(bytes(batch["txt"][i]).decode("utf-8")) for i in members])
        return self.rows([decode_json(bytes(batch["json"][i])) for i in members])

    def rows(self, samples: Iterable[Sample]) -> Rows:
        """The rows of one shard's samples, which are of this kind."""
        encoder, length = self.encoder, self.length
        match self.kind:
            case "text":
                texts = [s.text for s in samples if isinstance(s, Text)]
                return pack(encoder.texts(texts), length, encoder.pad_id, split=True)
            case "pairs":
                pairs = [(s.prompt, s.answer) for s in samples if isinstance(s, Pair)]
                documents = encoder.pairs(pairs, loss_on_all=self.loss_on_all)
                return pack(documents, length, encoder.pad_id, split=False)
            case "preferences":
                found = [(s.prompt, s.chosen, s.rejected) for s in samples if isinstance(s, Preference)]
                return pack_preferences(encoder.preferences(found), length, encoder.pad_id)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A dataset as training wants it. Pickles into every worker; `rows` opens one rank's part."""

    spec: PackSpec
    config: DataConfig
    seed: int
    shards: tuple[str, ...]
    held: tuple[Any, ...] = ()
    """Object references of packed rows, if they are held."""
    counts: tuple[int, ...] = ()
    """Rows in each."""
    lanes: int = 0
    """Lanes, if rows are streamed."""

    def cursor(self, rows: int) -> dict[str, Any]:
        """What a checkpoint keeps to go on after `rows` rows."""
        return {"rows": rows, "total": sum(self.counts), "lanes": self.lanes, "seed": self.seed}

    def rows(self, rank: int, world: int, cursor: dict[str, Any] | None) -> RowSource:
        """The rows of data-parallel rank `rank`, from the one after `cursor`.

        Raises DataError if the cursor belongs to other data.
        """
        taken = 0
        lanes = self.lanes
        if cursor is not None:
            taken, lanes = int(cursor["rows"]), int(cursor["lanes"])
            ours = (sum(self.counts), self.seed, bool(self.lanes))
            if (cursor["total"], cursor["seed"], bool(lanes)) != ours:
                raise DataError(
                    "The checkpoint was made with other data, another data.sequence_length or another seed, so its place in "
                    "the data means nothing here. Start a new job, or give this one its old config back."
                )
        if self.held:
            return HeldRows(self, start=taken + rank, stride=world)
        return StreamedRows(self, rank=rank, world=world, lanes=lanes, taken=taken)


class HeldRows:
    """Rows out of shared memory."""

    def __init__(self, stream: Stream, *, start: int, stride: int) -> None:
        self._blocks: list[Rows] = [np.asarray(block) for block in ray.get(list(stream.held))]
        self._starts = np.cumsum([0, *stream.counts])
        self._indices = held_rows(int(self._starts[-1]), stream.seed, stream.config.shuffle, start, stride)

    def take(self, count: int) -> Rows:
        """The next `count` rows."""
        indices = np.fromiter(itertools.islice(self._indices, count), np.int64, count)
        blocks = np.searchsorted(self._starts, indices, side="right") - 1
        return np.stack([self._blocks[b][i - self._starts[b]] for b, i in zip(blocks, indices, strict=True)])


class StreamedRows:
    """Rows read while training goes on, each lane in its own order."""

    def __init__(self, stream: Stream, *, rank: int, world: int, lanes: int, taken: int) -> None:
        self._stream = stream
        self._sources: list[Iterator[Rows]] = []
        for number in lanes_of(rank, world, lanes):
            lane = Lane(number, lanes, len(stream.shards), stream.seed, stream.config.shuffle)
            # Of the first `taken` rows of the global order, those that this lane gave.
            skip = taken // lanes + (1 if number < taken % lanes else 0)
            self._sources.append(lane.rows(self._read, skip))
        first = next(n for n in range(taken, taken + world) if n % world == rank)
        self._turn = itertools.cycle(range(len(self._sources)))
        for _ in range(first // world % len(self._sources)):
            next(self._turn)

    def take(self, count: int) -> Rows:
        """The next `count` rows."""
        return np.stack([next(self._sources[next(self._turn)]) for _ in range(count)])

    def _read(self, shards: list[int]) -> Iterator[Rows]:
        config = self._stream.config
        packed = packed_dataset(
            [self._stream.shards[s] for s in shards], self._stream.spec, config, tasks=1, blocks=len(shards)
        )
        # A split of one: its executor is an actor of its own, and does not take the training process's time.
        (split,) = packed.streaming_split(1, equal=False)
        for batch in split.iter_batches(
            batch_size=None,  # type: ignore[arg-type]
            batch_format="numpy",
            prefetch_batches=max(1, config.prefetch_batches),
        ):
            yield from batch["row"]


def packed_dataset(
    paths: list[str], spec: PackSpec, config: DataConfig, *, tasks: int, blocks: int = 1
) -> ray.data.Dataset:
    """The packed rows of shards, shard by shard in the order of `paths`, by at most `tasks` processes at a time."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    read = ray.data.read_webdataset(
        paths,
        decoder=None,
        include_paths=True,
        override_num_blocks=min(len(paths), tasks * blocks),
        num_cpus=config.readers,
        concurrency=tasks,
    )
    return read.map_batches(
        spec,
        batch_size=None,
        batch_format="numpy",
        num_cpus=config.readers,
        compute=ray.data.TaskPoolStrategy(size=tasks),
        udf_modifying_row_count=True,
    )


def open_stream(
    folder: Path,
    index: DatasetIndex,
    encoder: TextEncoder,
    config: DataConfig,
    *,
    workers: int,
    seed: int,
    held_bytes: int | None = None,
) -> Stream:
    """Prepare a dataset for `workers` ranks that see different rows; called once, by the driver, after `ray.init`.

    `held_bytes`: most packed bytes to hold (None: a quarter of the object store). Raises DataError before any worker starts
    when no row carries loss, or when there are too few rows or shards for the workers.
    """
    spec = PackSpec(
        encoder=encoder, kind=index.kind, length=config.sequence_length, loss_on_all=config.loss_on == "all"
    )
    if index.kind != "text":
        # A chat template that cannot be used is told of here, not by a task far away.
        list(encoder.pairs([("question", "answer")]))
    shards = tuple(str(path) for path in index.shard_paths(folder))
    if held_bytes is None:
        held_bytes = int(HELD_SHARE * ray.cluster_resources().get("object_store_memory", 2**30))
    stream = Stream(spec=spec, config=config, seed=seed, shards=shards)
    if index.total_bytes * PACKED_PER_BYTE > held_bytes:
        first = packed_dataset(list(shards), spec, config, tasks=1, blocks=len(shards)).take(1)
        if not first:
            raise _nothing_usable(folder, index, config)
        return replace(stream, lanes=lane_count(len(shards), workers))
    tasks = min(len(shards), 1 + index.total_bytes // TASK_BYTES)
    references = packed_dataset(list(shards), spec, config, tasks=tasks).materialize().to_numpy_refs(column="row")
    blocks = ray.get(references)
    kept = [(reference, len(block)) for reference, block in zip(references, blocks, strict=True) if len(block)]
    total = sum(count for _, count in kept)
    if not total:
        raise _nothing_usable(folder, index, config)
    if total < workers:
        raise DataError(
            f"{folder} packs into {total} rows of {config.sequence_length} tokens, too few for the {workers} workers that see "
            "different rows. Lower data.sequence_length or parallel.workers, or add data."
        )
    return replace(stream, held=tuple(r for r, _ in kept), counts=tuple(c for _, c in kept))


def _nothing_usable(folder: Path, index: DatasetIndex, config: DataConfig) -> DataError:
    reason = (
        f"none of its {index.samples} answers begins within {config.sequence_length} tokens"
        if index.kind == "pairs"
        else f"none of its {index.samples} pairs of answers differs within {config.sequence_length} tokens"
        if index.kind == "preferences"
        else f"its {index.samples} texts are empty"
    )
    return DataError(f"{folder} holds no usable row: {reason}. Raise data.sequence_length, or use other data.")
