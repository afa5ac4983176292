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
"""Bytes above which the loop then belongs to others for as long."""
STEP_S = 0.001
"""Seconds of work after which other tasks run for as long."""
P = ParamSpec("P")
T = TypeVar("T")


class LargeBodies:
    """The turns of one gateway."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def run(self, size: int, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Do a piece of work on a body of `size` bytes: at once for a small one, else when it is its turn."""
        if size <= TURN_BYTES:
            return work(*args, **options)
        async with self._turn:
            began = time.perf_counter()
            try:
                return work(*args, **options)
            finally:
                await asyncio.sleep(time.perf_counter() - began if size > LARGE_BYTES else 0.0)

    async def aside(self, size: int, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Do work that lets other threads run: in one of its own for a large body."""
        if size <= LARGE_BYTES:
            return work(*args, **options)
        return await asyncio.to_thread(work, *args, **options)

    async def run_steps(self, size: int, steps: Iterator[None]) -> None:
        """Work that comes in steps."""
        if size <= LARGE_BYTES:
            for _ in steps:
                pass
            return
        async with self._turn:
            began = time.perf_counter()
            try:
                for _ in steps:
                    if (busy_s := time.perf_counter() - began) > STEP_S:
                        await asyncio.sleep(busy_s)
                        began = time.perf_counter()
            finally:
                await asyncio.sleep(time.perf_counter() - began)
