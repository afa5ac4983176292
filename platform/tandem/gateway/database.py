"""Questions of routes to the database: in threads, for a limited time."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

from tandem.gateway.errors import no_registry

T = TypeVar("T")

ANSWER_S = 30.0
"""Seconds that the database may take; then the client gets 503."""


async def ask_database(
    threads: Executor, retry_after_s: int, work: Callable[..., T], *args: object, **options: object
) -> T:
    """The result of blocking work in a thread; ApiError 503 if it does not end within `ANSWER_S`."""
    call = functools.partial(work, *args, **options)
    try:
        async with asyncio.timeout(ANSWER_S):
            return await asyncio.get_running_loop().run_in_executor(threads, call)
    except TimeoutError:
        raise no_registry(f"The database did not answer within {ANSWER_S:g} s", retry_after_s) from None
