"""Large bodies take turns on the event loop: one at a time, in steps of a millisecond or some, for at most half of the time.

Parsing, checking and hashing a body of 2 MiB takes 10 to 30 ms, and nothing else of the process runs meanwhile. With several of
them every stream would wait for all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

TURN_BYTES = 16 * 1024
"""Bytes above which a body waits for its turn: several in one round of the event loop would add up."""
LARGE_BYTES = 128 * 1024
"""Bytes above which other tasks then run for as long as the work took."""
STEP_S = 0.001
"""Seconds of work after which other tasks run for as long."""
P = ParamSpec("P")
T = TypeVar("T")


class LargeBodies:
    """The turns of one gateway."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def run(self, size: int, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Do work on a body of `size` bytes: at once for a small one, else when it is its turn."""
        if size <= TURN_BYTES:
            return work(*args, **options)
        async with self._lock:
            started_at = time.perf_counter()
            try:
                return work(*args, **options)
            finally:
                await asyncio.sleep(time.perf_counter() - started_at if size > LARGE_BYTES else 0.0)

    async def run_in_thread(self, size: int, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Do work that releases the GIL: in a thread for a large body, else at once."""
        if size <= LARGE_BYTES:
            return work(*args, **options)
        return await asyncio.to_thread(work, *args, **options)

    async def run_steps(self, size: int, steps: Iterator[None]) -> None:
        """Run an iterator of short steps, with pauses for other tasks."""
        if size <= LARGE_BYTES:
            for _ in steps:
                pass
            return
        async with self._lock:
            started_at = time.perf_counter()
            try:
                for _ in steps:
                    if (busy_s := time.perf_counter() - started_at) > STEP_S:
                        await asyncio.sleep(busy_s)
                        started_at = time.perf_counter()
            finally:
                await asyncio.sleep(time.perf_counter() - started_at)
