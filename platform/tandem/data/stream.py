"""Stream of packed rows for training ranks, in the order of `tandem.data.order`, with an exact cursor.

The run's reader (`tandem.data.reader`) reads, tokenises and packs shards in the cluster, ahead of the ranks; a rank follows the
order, requests its next shards from the reader, and prefetches some batches. Ranks that share a model see the same rows because
they have the same data rank; each of them requests its own rows.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from tandem.storage import Location

IN_MEMORY_SHARE = 0.25
"""Share of the object store that packed rows may occupy for the whole run."""

MAX_RETRIES = 3
"""Further requests for blocks that were lost with a node or with the reader."""

Notify = Callable[[str], None]


def rows_consumed(cursor: Mapping[str, Any]) -> int:
    """Rows of the stream, over all ranks, that lie before a cursor; those that were left out count too."""
    return int(cursor["walk"]["rows"]) if cursor else 0


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The datasets of a run, ready for training. Pickled into every worker; `rows` opens one rank's part."""

    config: DataConfig
    order: Order
    sources: tuple[Source, ...]
    identity: str
    """Digest of everything that decides the rows and their order."""
    reader: Any

    def rows(
        self,
        rank: int,
        world: int,
        cursor: Mapping[str, Any] | None,
        *,
        process: tuple[int, int] | None = None,
        notify: Notify = lambda message: None,
    ) -> StreamRows:
        """The rows of data rank `rank` of `world`, from the one after `cursor`; `notify` gets a message for each skipped shard.

        `process`: number and count of the processes that read, where several have the same data rank.
        Raises DataError if the cursor belongs to other data.
        """
        state = None
        if cursor:
            if cursor.get("data") != self.identity:
                raise DataError(
                    "The checkpoint was made with other data, another data.sequence_length or another seed, so its "
                    "position in the data cannot be used. Start a new job, or give this one its old config back."
                )
            state = cursor["walk"]
        return StreamRows(self, rank, world, state, process or (rank, world), notify)

    def name(self, row: RowPosition) -> str:
        """Shard, number and epoch of a row, for messages."""
        return f"{self.sources[row.dataset].paths[row.shard]} row {row.row} (epoch {row.epoch + 1})"


@dataclass(frozen=True, slots=True)
class _Batch:
    rows: Rows
    positions: list[RowPosition]
    sampler_state: dict[str, Any]
    """State of the sampler after these rows."""


class StreamRows:
    """The rows of one rank; a thread keeps batches ready."""

    def __init__(
        self,
        stream: Stream,
        rank: int,
        world: int,
        state: Mapping[str, Any] | None,
        process: tuple[int, int],
        notify: Notify,
    ) -> None:
        self._stream = stream
        self._rank = rank
        self._world = world
        self._process = process
        self._skipped = SkippedShards(stream.config.skip_damaged, notify)
        self._sampler_state = dict(state) if state else None
        self._prefetcher: _Prefetcher | None = None
        self.positions: list[RowPosition] = []
        """Positions of the rows of the last `take`."""

    def take(self, count: int) -> Rows:
        """The next `count` rows of this rank; [count, 3, T], or [count, 6, T] of preferences."""
        if self._prefetcher is None or self._prefetcher.count != count:
            self.close()
            self._prefetcher = _Prefetcher(self._batch_maker(count), count, self._stream.config.prefetch_batches)
        batch = self._prefetcher.next()
        self._sampler_state, self.positions = batch.sampler_state, batch.positions
        return batch.rows

    def skip(self, count: int) -> None:
        """Skip the next `count` rows of all ranks together; every rank calls it."""
        self.close()
        blocks = BlockFetcher(self._stream, self._process, self._skipped)
        sampler = Sampler(self._stream.order, blocks.count, self._sampler_state)
        for _ in range(count):
            next(sampler)
            blocks.keep(sampler.upcoming_shards(0))
        self._sampler_state = sampler.state()

    def cursor(self) -> dict[str, Any]:
        """The position for a checkpoint: after the rows that all ranks have taken so far."""
        state = self._sampler_state or Sampler(self._stream.order, lambda position: 0).state()
        return {"data": self._stream.identity, "walk": state}

    def close(self) -> None:
        """End the prefetching thread; a later `take` starts another, which prepares the discarded batches again."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def _batch_maker(self, count: int) -> Callable[[], _Batch]:
        blocks = BlockFetcher(self._stream, self._process, self._skipped)
        sampler = Sampler(self._stream.order, blocks.count, self._sampler_state)

        def make() -> _Batch:
            # All open shards in one request: a resumed run needs these first.
            blocks.expect(sampler.upcoming_shards(0))
            positions = sampler.share(self._rank, self._world, count)
            rows = np.stack([blocks.rows(ShardPosition(*position[:3]))[position.row] for position in positions])
            blocks.keep(sampler.upcoming_shards(0))
            return _Batch(rows, positions, sampler.state())

        return make


class BlockFetcher:
    """The packed rows of the shards that one rank has open."""

    def __init__(self, stream: Stream, process: tuple[int, int], skipped: SkippedShards) -> None:
        self._stream = stream
        self._process = process
        self._skipped = skipped
        self._rows_by_position: dict[ShardPosition, Rows] = {}

    def count(self, position: ShardPosition) -> int:
        """Number of packed rows of the shard at a position."""
        return len(self.rows(position))

    def rows(self, position: ShardPosition) -> Rows:
        """The rows of the shard at a position, in shared memory; none of a damaged shard that is skipped."""
        if position not in self._rows_by_position:
            self.expect([position])
        return self._rows_by_position[position]

    def expect(self, positions: list[ShardPosition]) -> None:
        """Fetch the rows of several shards in one request."""
        missing = [position for position in positions if position not in self._rows_by_position]
        if not missing:
            return
        for position, block in zip(missing, self._fetch(missing), strict=True):
            packed, shard = rows_of(block), self._stream.order.shard(position)
            if packed.shard != self._stream.sources[position.dataset].paths[shard]:
                # Nothing else would detect rows of another shard.
                raise RuntimeError(f"The reader returned the rows of {packed.shard} for {position}.")
            self._rows_by_position[position] = packed.rows
            if packed.error:
                self._skipped.add((position.dataset, shard), packed.error)

    def _fetch(self, positions: list[ShardPosition]) -> list[Any]:
        discard = False
        for retries_left in reversed(range(MAX_RETRIES + 1)):
            references = ray.get(self._stream.reader.blocks.remote(positions, *self._process, discard))
            try:
                return ray.get([reference for (reference,) in references])
            except ray.exceptions.ObjectLostError:
                # The reader, or the node with a block, has died: its blocks are packed again.
                discard = True
                if not retries_left:
                    raise
        raise AssertionError("the last time returns or raises")

    def keep(self, positions: list[ShardPosition]) -> None:
        """Release the rows of all other shards."""
        self._rows_by_position = {
            position: rows for position, rows in self._rows_by_position.items() if position in positions
        }


class SkippedShards:
    """The damaged shards that a rank has skipped, at most `limit`."""

    def __init__(self, limit: int, notify: Notify) -> None:
        self._limit = limit
        self._notify = notify
        self._shards: set[tuple[int, int]] = set()

    def add(self, shard: tuple[int, int], error: str) -> None:
        """Record and report a damaged shard; DataError once there are more than `limit`."""
        if shard in self._shards:
            return
        if len(self._shards) >= self._limit:
            limit_note = f" data.skip_damaged ({self._limit}) have been left out already." if self._limit else ""
            raise DataError(error + limit_note)
        self._shards.add(shard)
        self._notify(f"Left out, number {len(self._shards)} of at most {self._limit}: {error}")


class _Prefetcher:
    """Makes batches in a thread, at most `depth` ahead of the consumer; with depth 0, in the consumer's thread."""

    def __init__(self, make: Callable[[], _Batch], count: int, depth: int) -> None:
        self.count = count
        self._make = make
        self._batches: queue.Queue[_Batch | BaseException] = queue.Queue(max(1, depth))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rows", daemon=True) if depth else None
        if self._thread:
            self._thread.start()

    def next(self) -> _Batch:
        """The next batch; raises the exception that making it raised."""
        if self._thread is None:
            return self._make()
        batch = self._batches.get()
        if isinstance(batch, BaseException):
            # A later call raises it again.
            self._batches.put(batch)
            raise batch
        return batch

    def close(self) -> None:
        """End the thread; one that waits for the reader ends when the reader answers."""
        self._closed.set()
        if self._thread:
            self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while not self._closed.is_set():
            batch: _Batch | BaseException
            try:
                batch = self._make()
            except BaseException as error:  # noqa: BLE001 - raised again by `next`, which would otherwise wait for ever
                batch = error
            while not self._closed.is_set():
                try:
                    self._batches.put(batch, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(batch, BaseException):
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
        # Raises here, not in a remote task, for a chat template that cannot be used.
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
        held_bytes = int(IN_MEMORY_SHARE * ray.cluster_resources().get("object_store_memory", 2**30))
    reader = start_reader(order, sources, config, held_bytes)
    stream = Stream(config=config, order=order, sources=sources, identity=identity, reader=reader)
    _check_rows(stream, parts, workers)
    return stream


def _check_rows(stream: Stream, parts: tuple[Part, ...], workers: int) -> None:
    """Read the first shards until each dataset has a row, and all together one for each worker; DataError if not."""
    total = 0
    skipped = SkippedShards(stream.config.skip_damaged, lambda message: None)
    for number, part in enumerate(parts):
        blocks = BlockFetcher(stream, (-1, 1), skipped)
        num_rows, position = 0, ShardPosition(number, 0, 0)
        while position.epoch == 0 and (not num_rows or total + num_rows < workers):
            num_rows += blocks.count(position)
            blocks.keep([])
            position = stream.order.next_position(position)
        if not num_rows:
            raise _no_usable_rows_error(part.location, part.index.kind, part.index.samples, stream.config)
        total += num_rows
    if total < workers:
        raise DataError(
            f"{' and '.join(str(part.location) for part in parts)} packs into {total} rows of {stream.config.sequence_length} "
            f"tokens, too few for the {workers} workers that see different rows. Lower data.sequence_length or parallel.workers, "
            "or add data."
        )


def _no_usable_rows_error(location: Location, kind: str, samples: int, config: DataConfig) -> DataError:
    reason = {
        "text": f"its {samples} texts are empty",
        "chats": f"in none of its {samples} chats does the assistant speak within {config.sequence_length} tokens",
        "pairs": f"none of its {samples} answers begins within {config.sequence_length} tokens",
        "preferences": f"none of its {samples} pairs of answers differs within {config.sequence_length} tokens",
    }[kind]
    return DataError(f"{location} holds no usable row: {reason}. Raise data.sequence_length, or use other data.")
