"""Stream of packed rows for training ranks, in the order of `tandem.data.order`, with an exact cursor.

Shards are read, tokenised and packed by the run's reader (`tandem.data.reader`), in the cluster, ahead of the ranks; a rank walks
the order, asks the reader for the shards that it comes to, and keeps some batches ahead of its training step. Ranks that share a
model see the same rows because they are given the same data rank; none of them reads for the others.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.exceptions

from tandem.config import DataConfig
from tandem.data.index import Part
from tandem.data.order import Order, RowPosition, Sampler, ShardPosition
from tandem.data.packing import Rows
from tandem.data.reader import start_reader
from tandem.data.spec import Source, rows_of
from tandem.data.tokenize import TextEncoder
from tandem.errors import DataError
from tandem.ids import digest

HELD_SHARE = 0.25
"""Share of the object store that packed rows may stay in."""

ASKED_AGAIN = 3
"""Times that blocks which got lost on their way are asked for again."""

Tell = Callable[[str], None]


def rows_consumed(cursor: Mapping[str, Any]) -> int:
    """Rows of the stream, over all ranks, that lie before a cursor; those that were left out count too."""
    return int(cursor["walk"]["rows"]) if cursor else 0


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Datasets as training wants them. Pickles into every worker; `rows` opens one rank's part."""

    config: DataConfig
    order: Order
    sources: tuple[Source, ...]
    identity: str
    """Digest of all that decides which row comes when."""
    reader: Any

    def rows(
        self,
        rank: int,
        world: int,
        cursor: Mapping[str, Any] | None,
        *,
        process: tuple[int, int] | None = None,
        tell: Tell = lambda message: None,
    ) -> StreamRows:
        """The rows of data rank `rank` of `world`, from the one after `cursor`; `tell` hears of shards that are left out.

        `process`: number and count of the processes that read, where several have the same data rank.
        Raises DataError if the cursor belongs to other data.
        """
        state = None
        if cursor:
            if cursor.get("data") != self.identity:
                raise DataError(
                    "The checkpoint was made with other data, another data.sequence_length or another seed, so its place in "
                    "the data means nothing here. Start a new job, or give this one its old config back."
                )
            state = cursor["walk"]
        return StreamRows(self, rank, world, state, process or (rank, world), tell)

    def name(self, row: RowPosition) -> str:
        """Where a row comes from, in words."""
        return f"{self.sources[row.dataset].paths[row.shard]} row {row.row} (epoch {row.epoch + 1})"


@dataclass(frozen=True, slots=True)
class _Batch:
    rows: Rows
    positions: list[RowPosition]
    after: dict[str, Any]
    """Where the sampler stood then."""


class StreamRows:
    """The rows of one rank; a thread keeps batches ready."""

    def __init__(
        self,
        stream: Stream,
        rank: int,
        world: int,
        state: Mapping[str, Any] | None,
        process: tuple[int, int],
        tell: Tell,
    ) -> None:
        self._stream = stream
        self._rank = rank
        self._world = world
        self._process = process
        self._skipped = SkippedShards(stream.config.skip_damaged, tell)
        self._state = dict(state) if state else None
        self._ahead: _Prefetcher | None = None
        self.positions: list[RowPosition] = []
        """Where the rows that were taken last come from."""

    def take(self, count: int) -> Rows:
        """The next `count` rows of this rank; [count, 3, T], or [count, 6, T] of preferences."""
        if self._ahead is None or self._ahead.count != count:
            self.close()
            self._ahead = _Prefetcher(self._make_next(count), count, self._stream.config.prefetch_batches)
        batch = self._ahead.next()
        self._state, self.positions = batch.after, batch.positions
        return batch.rows

    def skip(self, count: int) -> None:
        """Leave out the next `count` rows of all ranks together; every rank has to."""
        self.close()
        blocks = BlockFetcher(self._stream, self._process, self._skipped)
        sampler = Sampler(self._stream.order, blocks.count, self._state)
        for _ in range(count):
            next(sampler)
            blocks.keep(sampler.coming(0))
        self._state = sampler.state()

    def cursor(self) -> dict[str, Any]:
        """What a checkpoint keeps, to go on after the rows that all ranks have taken so far."""
        state = self._state or Sampler(self._stream.order, lambda position: 0).state()
        return {"data": self._stream.identity, "walk": state}

    def close(self) -> None:
        """End the thread; what it has made ready is made again when rows are taken after all."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _make_next(self, count: int) -> Callable[[], _Batch]:
        blocks = BlockFetcher(self._stream, self._process, self._skipped)
        sampler = Sampler(self._stream.order, blocks.count, self._state)

        def make() -> _Batch:
            # All that are open at once: where a run goes on, these are the ones to read first.
            blocks.expect(sampler.coming(0))
            positions = sampler.share(self._rank, self._world, count)
            rows = np.stack([blocks.rows(ShardPosition(*position[:3]))[position.row] for position in positions])
            blocks.keep(sampler.coming(0))
            return _Batch(rows, positions, sampler.state())

        return make


class BlockFetcher:
    """The packed shards that one rank is at."""

    def __init__(self, stream: Stream, process: tuple[int, int], skipped: SkippedShards) -> None:
        self._stream = stream
        self._process = process
        self._skipped = skipped
        self._found: dict[ShardPosition, Rows] = {}

    def count(self, position: ShardPosition) -> int:
        """Rows that the shard there packs into."""
        return len(self.rows(position))

    def rows(self, position: ShardPosition) -> Rows:
        """The rows of the shard there, where they lie in shared memory; of a damaged one that is left out, none."""
        if position not in self._found:
            self.expect([position])
        return self._found[position]

    def expect(self, positions: list[ShardPosition]) -> None:
        """Fetch several at once."""
        missing = [position for position in positions if position not in self._found]
        if not missing:
            return
        for position, block in zip(missing, self._fetched(missing), strict=True):
            packed, shard = rows_of(block), self._stream.order.shard(position)
            if packed.shard != self._stream.sources[position.dataset].paths[shard]:
                # Nothing else would notice that the rows are not those that should come.
                raise RuntimeError(f"The reader returned the rows of {packed.shard} for {position}.")
            self._found[position] = packed.rows
            if packed.error:
                self._skipped.add((position.dataset, shard), packed.error)

    def _fetched(self, positions: list[ShardPosition]) -> list[Any]:
        lost = False
        for left in reversed(range(ASKED_AGAIN + 1)):
            references = ray.get(self._stream.reader.blocks.remote(positions, *self._process, lost))
            try:
                return ray.get([reference for (reference,) in references])
            except ray.exceptions.ObjectLostError:
                # The reader, or the node where a block lay, has died since: what it held is packed again.
                lost = True
                if not left:
                    raise
        raise AssertionError("the last time returns or raises")

    def keep(self, positions: list[ShardPosition]) -> None:
        """Let go of all others."""
        self._found = {position: rows for position, rows in self._found.items() if position in positions}


class SkippedShards:
    """The damaged shards that were met."""

    def __init__(self, most: int, tell: Tell) -> None:
        self._most = most
        self._tell = tell
        self._shards: set[tuple[int, int]] = set()

    def add(self, shard: tuple[int, int], error: str) -> None:
        """Tell of a shard; DataError once there are more than may be."""
        if shard in self._shards:
            return
        if len(self._shards) >= self._most:
            allowed = f" data.skip_damaged ({self._most}) have been left out already." if self._most else ""
            raise DataError(error + allowed)
        self._shards.add(shard)
        self._tell(f"Left out, number {len(self._shards)} of at most {self._most}: {error}")


class _Prefetcher:
    """Makes batches in a thread, at most `depth` more than were taken; with no depth, when they are asked for."""

    def __init__(self, make: Callable[[], _Batch], count: int, depth: int) -> None:
        self.count = count
        self._make = make
        self._ready: queue.Queue[_Batch | BaseException] = queue.Queue(max(1, depth))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rows", daemon=True) if depth else None
        if self._thread:
            self._thread.start()

    def next(self) -> _Batch:
        """The next batch; raises what making it did."""
        if self._thread is None:
            return self._make()
        found = self._ready.get()
        if isinstance(found, BaseException):
            # Whoever asks again is told again.
            self._ready.put(found)
            raise found
        return found

    def close(self) -> None:
        """End the thread, unless it waits for the reader: it ends then when that answers."""
        self._closed.set()
        if self._thread:
            self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while not self._closed.is_set():
            made: _Batch | BaseException
            try:
                made = self._make()
            except BaseException as error:  # noqa: BLE001 - raised where the batch is taken, which would wait for ever
                made = error
            while not self._closed.is_set():
                try:
                    self._ready.put(made, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(made, BaseException):
                return


def open_stream(
    parts: tuple[Part, ...],
    encoder: TextEncoder,
    config: DataConfig,
    *,
    workers: int,
    seed: int,
    held_bytes: int | None = None,
) -> Stream:
    """Prepare datasets for `workers` ranks that see different rows; called once, by the driver, after `ray.init`.

    `held_bytes`: most packed bytes that stay in memory (None: a quarter of the object store); the order of rows does not depend
    on it. Raises DataError before any worker starts if a dataset has no row with loss, or if all have fewer rows than there are
    workers.
    """
    on_all = config.loss_on == "all"
    sources = tuple(Source.of(part, encoder, length=config.sequence_length, loss_on_all=on_all) for part in parts)
    if any(part.index.kind != "text" for part in parts):
        # A chat template that cannot be used is told of here, not by a task far away.
        list(encoder.pairs([("question", "answer")]))
    order = Order(
        shards=tuple(len(source.paths) for source in sources),
        weights=tuple(part.weight for part in parts),
        seed=seed,
        shuffle=config.shuffle,
        open_shards=config.open_shards,
    )
    identity = digest(
        [
            [[part.index.kind, list(source.digests), part.weight] for part, source in zip(parts, sources, strict=True)],
            encoder.digest(), config.sequence_length, on_all, seed, config.shuffle, config.open_shards,
        ]
    )  # fmt: skip
    if held_bytes is None:
        held_bytes = int(HELD_SHARE * ray.cluster_resources().get("object_store_memory", 2**30))
    reader = start_reader(order, sources, config, held_bytes)
    stream = Stream(config=config, order=order, sources=sources, identity=identity, reader=reader)
    _check_rows(stream, parts, workers)
    return stream


def _check_rows(stream: Stream, parts: tuple[Part, ...], workers: int) -> None:
    """Look at the first shards until each dataset has a row, and all together one for each worker."""
    total = 0
    skipped = SkippedShards(stream.config.skip_damaged, lambda message: None)
    for number, part in enumerate(parts):
        blocks = BlockFetcher(stream, (-1, 1), skipped)
        found, position = 0, ShardPosition(number, 0, 0)
        while position.epoch == 0 and (not found or total + found < workers):
            found += blocks.count(position)
            blocks.keep([])
            position = stream.order.after(position)
        if not found:
            raise _nothing_usable(part.folder, part.index.kind, part.index.samples, stream.config)
        total += found
    if total < workers:
        raise DataError(
            f"{' and '.join(str(part.folder) for part in parts)} packs into {total} rows of {stream.config.sequence_length} "
            f"tokens, too few for the {workers} workers that see different rows. Lower data.sequence_length or parallel.workers, "
            "or add data."
        )


def _nothing_usable(folder: Path, kind: str, samples: int, config: DataConfig) -> DataError:
    reason = {
        "text": f"its {samples} texts are empty",
        "chats": f"in none of its {samples} chats does the assistant speak within {config.sequence_length} tokens",
        "pairs": f"none of its {samples} answers begins within {config.sequence_length} tokens",
        "preferences": f"none of its {samples} pairs of answers differs within {config.sequence_length} tokens",
    }[kind]
    return DataError(f"{folder} holds no usable row: {reason}. Raise data.sequence_length, or use other data.")
