"""Reader actor of a training run: Ray Data reads, tokenizes and packs shards ahead of the ranks that request them.

Ranks request shards by their position in the order; they get references to packed blocks, and read the rows from shared memory.
So a shard is packed once, whatever the number of ranks, and never by a rank. The order is not decided here: a block that was
evicted, or an actor that was restarted, costs time and does not change the rows.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
import ray.data
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from tandem.config import DataConfig
from tandem.data.order import Order, ShardPosition
from tandem.data.spec import Source, pack_shards

WINDOW = 512
"""Shards in one run of Ray Data's executor."""
TASK_BYTES = 2**20
"""Bytes of text that a task packs, at least: it gets several small shards, and yields a block for each."""
EXTRA_BLOCKS = 8
"""Requested blocks that are kept for ranks that have not requested them yet, in addition to open ones."""
MIN_OBJECT_STORE_BYTES = 64 * 2**20
"""Bytes of the object store that Ray Data may always fill with blocks that were not consumed yet."""
PACKED_PER_BYTE = 4.0
"""Approximate bytes of packed rows for each byte of text: 12 bytes for a token of 3 to 4 characters."""

MAX_WAITING = 4096
"""Processes that may wait for blocks at a time."""

Key = tuple[int, ...]


def start_reader(order: Order, sources: tuple[Source, ...], config: DataConfig, held_bytes: int) -> Any:
    """Start the actor. Packed shards stay in memory if all of them take at most about `held_bytes`."""
    keep_in_memory = sum(sum(source.bytes) for source in sources) * PACKED_PER_BYTE <= held_bytes
    # Every rank calls it, and Ray may restart it: its whole state follows from its arguments and from the requests.
    actor: Any = ray.remote(ShardReader).options(
        num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=MAX_WAITING
    )
    return actor.remote(order, sources, config, keep_in_memory)


@dataclass
class _Block:
    position: ShardPosition
    reference: Any
    requesters: set[int] = field(default_factory=set)


class ShardReader:
    """The reader actor. Its methods run on the actor's event loop, Ray Data's executor in a thread."""

    def __init__(self, order: Order, sources: tuple[Source, ...], config: DataConfig, keep_in_memory: bool) -> None:
        self._order = order
        self._sources = sources
        self._config = config
        self._keep_in_memory = keep_in_memory
        self._lock = threading.Condition()
        self._blocks: dict[Key, _Block] = {}
        """Packed blocks, least recently requested first."""
        self._waiting: dict[Key, Future[Any]] = {}
        self._requested: list[ShardPosition] = []
        """Requested positions that no plan contains."""
        self._planned: dict[Key, ShardPosition] = {}
        """Positions of the current plan that are not packed yet, in the order of the plan."""
        self._latest: dict[int, ShardPosition] = {}
        """The furthest position of each dataset in its latest request: no rank waits for a position before it."""
        self._failed = False
        self._next: list[ShardPosition] = [ShardPosition(number, 0, 0) for number in range(len(sources))]
        """The next position to read ahead, for each dataset."""
        self._max_requested_blocks = order.open_shards * len(sources) + EXTRA_BLOCKS
        threading.Thread(target=self._read, name="reader", daemon=True).start()

    async def blocks(
        self, positions: list[ShardPosition], requester: int, num_requesters: int, discard: bool = False
    ) -> list[list[Any]]:
        """References to the blocks at these positions, each in a list of its own, once they are packed.

        `requester`: number of the calling process, of `num_requesters`; -1 is not counted. A block is evicted once all have
        requested it. `discard`: pack the blocks again, because one of them was lost.
        """
        futures = []
        with self._lock:
            requested = sorted({ShardPosition._make(position) for position in positions})
            self._latest |= {position.dataset: position for position in requested}
            for position in requested:
                key = self._key(position)
                if (block := self._blocks.pop(key, None)) is not None and not discard:
                    # Moved to the end of the dictionary: most recently requested.
                    self._blocks[key] = block
                    self._record_request(key, block, requester, num_requesters)
                    done: Future[Any] = Future()
                    done.set_result(block.reference)
                    futures.append(done)
                    continue
                if key not in self._waiting:
                    self._waiting[key] = Future()
                    if key not in self._planned or self._is_out_of_order(position):
                        self._requested.append(position)
                futures.append(self._waiting[key])
            self._lock.notify_all()
        references = [[await asyncio.wrap_future(future)] for future in futures]
        with self._lock:
            for position in requested:
                if (block := self._blocks.get(self._key(position))) is not None:
                    self._record_request(self._key(position), block, requester, num_requesters)
            self._lock.notify_all()
        by_position = dict(zip(requested, references, strict=True))
        return [by_position[ShardPosition._make(position)] for position in positions]

    def _is_out_of_order(self, position: ShardPosition) -> bool:
        """Whether the plan has earlier shards of the dataset that no rank has requested: shards come in order."""
        return any(
            planned.dataset == position.dataset and planned < position and key not in self._waiting
            for key, planned in self._planned.items()
        )

    def _key(self, position: ShardPosition) -> Key:
        # Blocks that stay in memory serve every epoch.
        return (position.dataset, self._order.shard(position)) if self._keep_in_memory else tuple(position)

    def _record_request(self, key: Key, block: _Block, requester: int, num_requesters: int) -> None:
        if requester >= 0:
            block.requesters.add(requester)
        if self._keep_in_memory:
            return
        if len(block.requesters) >= num_requesters:
            self._blocks.pop(key, None)
        requested_keys = [key for key, block in self._blocks.items() if block.requesters]
        for key in requested_keys[: max(0, len(requested_keys) - self._max_requested_blocks)]:
            del self._blocks[key]
        passed_keys = [key for key, block in self._blocks.items() if not block.requesters and self._is_passed(block)]
        for key in passed_keys:
            del self._blocks[key]

    def _is_passed(self, block: _Block) -> bool:
        return block.position < self._latest.get(block.position.dataset, block.position)

    # ---- the thread that reads ----

    def _read(self) -> None:
        while True:
            plan = self._plan()
            try:
                blocks = self._pack(plan)
                for position in plan:
                    if not self._deliver(position, next(blocks)):
                        break
                # Ends Ray Data's execution of an abandoned plan.
                del blocks
            except Exception as error:  # noqa: BLE001 - raised in every waiting call; a later call may succeed
                self._give_up(f"Reading data failed: {type(error).__name__}: {error}")

    def _plan(self) -> list[ShardPosition]:
        """The requested positions, then those that follow, datasets in proportion to their weights; waits until there are any."""
        with self._lock:
            while (self._failed and not self._requested) or not (plan := self._make_plan()):
                self._lock.wait()
            self._failed = False
            self._planned = {self._key(position): position for position in plan}
            return plan

    def _make_plan(self) -> list[ShardPosition]:
        requested = {
            key: position for position in sorted(self._requested) if (key := self._key(position)) in self._waiting
        }
        plan, keys, self._requested = list(requested.values()), set(requested), []
        if plan and not self._keep_in_memory:
            # Ranks are at another position than expected: blocks read ahead for the old position are evicted.
            self._blocks = {key: block for key, block in self._blocks.items() if block.requesters}
        for position in plan:
            self._next[position.dataset] = self._order.next_position(position)
        # Bytes read of each dataset, divided by its weight: the dataset with the fewest comes next.
        heap = [(0.0, number) for number in range(len(self._sources))]
        for _ in range(WINDOW + sum(self._order.shards)):
            if len(plan) >= WINDOW:
                break
            bytes_per_weight, number = heapq.heappop(heap)
            position = self._next[number]
            if (key := self._key(position)) not in self._blocks and key not in keys:
                plan.append(position)
                keys.add(key)
            self._next[number] = self._order.next_position(position)
            size = self._sources[number].bytes[self._order.shard(position)]
            heapq.heappush(heap, (bytes_per_weight + size / self._order.weights[number], number))
        return plan

    def _pack(self, plan: list[ShardPosition]) -> Iterator[Any]:
        """References to the packed blocks of a plan, by Ray Data."""
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        # Each table that a task yields stays a block of its own, and is not merged with others.
        context.target_max_block_size = 1
        config = self._config
        # Ray Data would fill half of the object store; `read_ahead` decides how many blocks are ready.
        largest = PACKED_PER_BYTE * max(size for source in self._sources for size in source.bytes)
        limit = max(MIN_OBJECT_STORE_BYTES, int(largest * (config.read_ahead + 2 * config.reader_tasks)))
        context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
            object_store_memory=limit
        )
        groups = self._groups(plan)
        packed = ray.data.read_datasource(
            PackedShards(groups),
            num_cpus=config.readers,
            concurrency=config.reader_tasks,
            override_num_blocks=len(groups),
        )
        for bundle in packed.iter_internal_ref_bundles():
            yield from bundle.block_refs

    def _groups(self, plan: list[ShardPosition]) -> list[list[Source]]:
        """The shards of a plan, in order, grouped by task."""
        groups: list[list[Source]] = []
        keep_in_memory = TASK_BYTES
        for position in plan:
            if keep_in_memory >= TASK_BYTES:
                groups.append([])
                keep_in_memory = 0
            shard = self._sources[position.dataset].only(self._order.shard(position))
            groups[-1].append(shard)
            keep_in_memory += sum(shard.bytes)
        return groups

    def _deliver(self, position: ShardPosition, reference: Any) -> bool:
        """Keep a block for its requests; waits while `read_ahead` blocks are ready. False if the plan must change."""
        with self._lock:
            key = self._key(position)
            del self._planned[key]
            self._blocks[key] = _Block(position, reference)
            if (future := self._waiting.pop(key, None)) is not None:
                future.set_result(reference)
            while not self._waiting and not self._requested and self._ready() >= self._config.read_ahead:
                self._lock.wait()
            if not self._requested:
                return True
            # Reading ahead continues at the first unread position of this plan; waiting requests enter the next plan.
            for unread in reversed(self._planned.values()):
                self._next[unread.dataset] = unread
            self._requested += [position for key, position in self._planned.items() if key in self._waiting]
            self._planned = {}
            return False

    def _give_up(self, reason: str) -> None:
        with self._lock:
            self._failed, self._planned = True, {}
            for future in self._waiting.values():
                future.set_exception(RuntimeError(reason))
            self._waiting.clear()

    def _ready(self) -> int:
        return sum(not block.requesters and not self._is_passed(block) for block in self._blocks.values())


class PackedShards(Datasource):
    """Datasource that reads, tokenises and packs shards: a task for each group of shards, a block for each shard."""

    def __init__(self, groups: list[list[Source]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._groups = groups

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: Ray Data gets the number of tasks instead."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """One task for each group, whatever the `parallelism`."""
        return [
            ReadTask(partial(pack_shards, group), BlockMetadata(len(group), None, None, None)) for group in self._groups
        ]
