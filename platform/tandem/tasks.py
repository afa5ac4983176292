"""Cancellation of asyncio tasks."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any


async def stop(task: asyncio.Future[Any] | None) -> None:
    """Cancel a task and wait for its end; raises the error with which it had ended before. None: there is no task."""
    if task is not None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def discard(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait for its end, whatever it ends with."""
    with contextlib.suppress(BaseException):
        await stop(task)
