"""Reader actor of a training run: Ray Data reads, tokenizes and packs shards ahead of the ranks that request them.

Ranks ask for shards by their position in the order; they get references to packed blocks, and take the rows from shared memory.
So a shard is packed once, whatever the number of ranks, and never by a rank. The order is not decided here: a block that has
been let go, or an actor that was started again, costs time and changes nothing.
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
"""Text that a task packs, at least: of small shards it takes several, which leave it one by one."""
STRAGGLERS = 8
"""Requested blocks that are kept for ranks that have not requested them yet, in addition to open ones."""
LEAST_LIMIT = 64 * 2**20
"""Bytes of the object store that Ray Data may always fill with what has not been taken."""
PACKED_PER_BYTE = 4.0
"""Bytes of packed rows for each byte of text, about: 12 for a token of 3 to 4 characters."""

MOST_ASKING = 4096
"""Processes that may wait for blocks at a time."""

Key = tuple[int, ...]


def start_reader(order: Order, sources: tuple[Source, ...], config: DataConfig, held_bytes: int) -> Any:
    """Start the actor. Packed shards stay in memory if all of them take at most about `held_bytes`."""
    held = sum(sum(source.bytes) for source in sources) * PACKED_PER_BYTE <= held_bytes
    # It is asked by every rank, and can be started again: all it knows is in its arguments and in what it is asked.
    actor: Any = ray.remote(ShardReader).options(
        num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=MOST_ASKING
    )
    return actor.remote(order, sources, config, held)


@dataclass
class _Block:
    position: ShardPosition
    reference: Any
    takers: set[int] = field(default_factory=set)


class ShardReader:
    """See the module. Its methods run on the actor's event loop, Ray Data's executor in a thread."""

    def __init__(self, order: Order, sources: tuple[Source, ...], config: DataConfig, held: bool) -> None:
        self._order = order
        self._sources = sources
        self._config = config
        self._held = held
        self._lock = threading.Condition()
        self._blocks: dict[Key, _Block] = {}
        """Packed blocks, least recently requested first."""
        self._waiting: dict[Key, Future[Any]] = {}
        self._asked: list[ShardPosition] = []
        """Requested positions that no plan contains."""
        self._planned: dict[Key, ShardPosition] = {}
        """What is being read, and will come in this order."""
        self._latest: dict[int, ShardPosition] = {}
        """The furthest position of each dataset in the request for it that came last: what lies before it is not waited for."""
        self._failed = False
        self._next: list[ShardPosition] = [ShardPosition(number, 0, 0) for number in range(len(sources))]
        """Where reading ahead goes on, for each dataset."""
        self._kept = order.open_shards * len(sources) + STRAGGLERS
        threading.Thread(target=self._read, name="reader", daemon=True).start()

    async def blocks(
        self, positions: list[ShardPosition], taker: int, takers: int, lost: bool = False
    ) -> list[list[Any]]:
        """References to the blocks at these positions, each in a list of its own, once they are packed.

        `taker` of `takers` asks: a block is let go when all have asked for it; -1 is none of them. `lost`: what lies ready is of
        no use, because one of these blocks is gone.
        """
        futures = []
        with self._lock:
            asked = sorted({ShardPosition._make(position) for position in positions})
            self._latest |= {position.dataset: position for position in asked}
            for position in asked:
                key = self._key(position)
                if (block := self._blocks.pop(key, None)) is not None and not lost:
                    # Last in the dictionary: asked for just now.
                    self._blocks[key] = block
                    self._took(key, block, taker, takers)
                    done: Future[Any] = Future()
                    done.set_result(block.reference)
                    futures.append(done)
                    continue
                if key not in self._waiting:
                    self._waiting[key] = Future()
                    if key not in self._planned or self._skips(position):
                        self._asked.append(position)
                futures.append(self._waiting[key])
            self._lock.notify_all()
        found = [[await asyncio.wrap_future(future)] for future in futures]
        with self._lock:
            for position in asked:
                if (block := self._blocks.get(self._key(position))) is not None:
                    self._took(self._key(position), block, taker, takers)
            self._lock.notify_all()
        by_position = dict(zip(asked, found, strict=True))
        return [by_position[ShardPosition._make(position)] for position in positions]

    def _skips(self, position: ShardPosition) -> bool:
        """Whether the plan has others of the dataset before this one, which nobody has asked for: shards come in order."""
        return any(
            other.dataset == position.dataset and other < position and key not in self._waiting
            for key, other in self._planned.items()
        )

    def _key(self, position: ShardPosition) -> Key:
        # Blocks that stay in memory serve every epoch.
        return (position.dataset, self._order.shard(position)) if self._held else tuple(position)

    def _took(self, key: Key, block: _Block, taker: int, takers: int) -> None:
        if taker >= 0:
            block.takers.add(taker)
        if self._held:
            return
        if len(block.takers) >= takers:
            self._blocks.pop(key, None)
        asked = [known for known, other in self._blocks.items() if other.takers]
        for known in asked[: max(0, len(asked) - self._kept)]:
            del self._blocks[known]
        passed = [known for known, other in self._blocks.items() if not other.takers and self._passed(other)]
        for known in passed:
            del self._blocks[known]

    def _passed(self, block: _Block) -> bool:
        return block.position < self._latest.get(block.position.dataset, block.position)

    # ---- the thread that reads ----

    def _read(self) -> None:
        while True:
            plan = self._plan()
            try:
                blocks = self._packed(plan)
                for position in plan:
                    if not self._deliver(position, next(blocks)):
                        break
                # What is left of an abandoned plan is not run.
                del blocks
            except Exception as error:  # noqa: BLE001 - whoever waits has to hear of it; who asks again may have more luck
                self._give_up(f"Reading data failed: {type(error).__name__}: {error}")

    def _plan(self) -> list[ShardPosition]:
        """What was asked for, then what follows it, datasets in the proportion of their weights; waits for something to do."""
        with self._lock:
            while (self._failed and not self._asked) or not (plan := self._planned_now()):
                self._lock.wait()
            self._failed = False
            self._planned = {self._key(position): position for position in plan}
            return plan

    def _planned_now(self) -> list[ShardPosition]:
        wanted = {key: position for position in sorted(self._asked) if (key := self._key(position)) in self._waiting}
        plan, keys, self._asked = list(wanted.values()), set(wanted), []
        if plan and not self._held:
            # Reading goes on from another position than was thought: what lies ready for the old one is in the way.
            self._blocks = {key: block for key, block in self._blocks.items() if block.takers}
        for position in plan:
            self._next[position.dataset] = self._order.after(position)
        # Read so many bytes of each dataset for its weight: the one that has read least comes next.
        coming = [(0.0, number) for number in range(len(self._sources))]
        for _ in range(WINDOW + sum(self._order.shards)):
            if len(plan) >= WINDOW:
                break
            spent, number = heapq.heappop(coming)
            position = self._next[number]
            if (key := self._key(position)) not in self._blocks and key not in keys:
                plan.append(position)
                keys.add(key)
            self._next[number] = self._order.after(position)
            size = self._sources[number].bytes[self._order.shard(position)]
            heapq.heappush(coming, (spent + size / self._order.weights[number], number))
        return plan

    def _packed(self, plan: list[ShardPosition]) -> Iterator[Any]:
        """References to the packed blocks of a plan, by Ray Data."""
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        # Each table that a task yields is a block of its own, and not put together with others up to some size.
        context.target_max_block_size = 1
        config = self._config
        # Ray Data would fill half of the object store: what lies ready is for `read_ahead` to say.
        largest = PACKED_PER_BYTE * max(size for source in self._sources for size in source.bytes)
        limit = max(LEAST_LIMIT, int(largest * (config.read_ahead + 2 * config.reader_tasks)))
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
        """The shards of a plan, in order, as tasks take them."""
        groups: list[list[Source]] = []
        held = TASK_BYTES
        for position in plan:
            if held >= TASK_BYTES:
                groups.append([])
                held = 0
            found = self._sources[position.dataset].only(self._order.shard(position))
            groups[-1].append(found)
            held += sum(found.bytes)
        return groups

    def _deliver(self, position: ShardPosition, reference: Any) -> bool:
        """Keep a block for those who ask; waits while enough lies ready. False: something else is wanted now."""
        with self._lock:
            key = self._key(position)
            del self._planned[key]
            self._blocks[key] = _Block(position, reference)
            if (future := self._waiting.pop(key, None)) is not None:
                future.set_result(reference)
            while not self._waiting and not self._asked and self._ready() >= self._config.read_ahead:
                self._lock.wait()
            if not self._asked:
                return True
            # Reading ahead goes on where this plan is left; what somebody waits for is in the next one.
            for left in reversed(self._planned.values()):
                self._next[left.dataset] = left
            self._asked += [position for key, position in self._planned.items() if key in self._waiting]
            self._planned = {}
            return False

    def _give_up(self, reason: str) -> None:
        with self._lock:
            self._failed, self._planned = True, {}
            for future in self._waiting.values():
                future.set_exception(RuntimeError(reason))
            self._waiting.clear()

    def _ready(self) -> int:
        return sum(not block.takers and not self._passed(block) for block in self._blocks.values())


class PackedShards(Datasource):
    """Shards for Ray Data to read, tokenise and pack: a task for each group of them, a block for each shard."""

    def __init__(self, groups: list[list[Source]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._groups = groups

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: Ray Data is told how many tasks there are instead."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """One for each group, whatever the `parallelism`."""
        return [
            ReadTask(partial(pack_shards, group), BlockMetadata(len(group), None, None, None)) for group in self._groups
        ]
