"""Calls to a registry's database from an event loop: in a thread of their own, with time-outs.

A call that takes too long leaves its thread, with its connections broken so that it ends; the next call has a thread and a
connection of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tandem.registry.connection import RegistryConnection

T = TypeVar("T")


class TimedCalls:
    """One thread for all calls to one connection."""

    def __init__(self, connection: RegistryConnection, name: str) -> None:
        """`name` is that of the thread."""
        self._connection = connection
        self._name = name
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(self, timeout_s: float, work: Callable[..., T], *args: Any) -> T:
        """The result of `work`; TimeoutError if there is none within `timeout_s`, time in the queue included."""
        thread = self._thread
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.get_running_loop().run_in_executor(thread, work, *args)
        except TimeoutError:
            # Of several calls that wait for one thread, the first replaces it.
            if thread is self._thread:
                thread.shutdown(wait=False)
                self._thread = ThreadPoolExecutor(1, thread_name_prefix=self._name)
                self._connection.abort()
            raise TimeoutError(f"the database did not answer within {timeout_s:g} s") from None

    def close(self) -> None:
        """End the thread and the connections."""
        self._thread.shutdown(wait=False)
        self._connection.abort()
