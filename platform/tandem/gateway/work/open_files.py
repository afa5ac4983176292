"""LRU cache of open files, by name."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

MOST_OPEN = 64
UNUSED_S = 60.0
"""Seconds after which a file that nobody uses is closed: one that was deleted holds its bytes until then."""


class Closeable(Protocol):
    """An open file."""

    def close(self) -> None:
        """Close it."""


F = TypeVar("F", bound=Closeable)


class OpenFiles(Generic[F]):
    """At most MOST_OPEN files; the one that was not used for longest is closed for another. Of one thread."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, tuple[F, float]] = OrderedDict()
        """With the monotonic times of their last use, oldest first."""

    def __len__(self) -> int:
        return len(self._files)

    def get(self, name: str, open_file: Callable[[], F]) -> F:
        """The file of a name, opened where it is not."""
        used = self._files.pop(name, None)
        file = open_file() if used is None else used[0]
        self._files[name] = file, time.monotonic()
        while len(self._files) > MOST_OPEN:
            self._close_oldest()
        return file

    def discard(self, name: str) -> None:
        """Close the file of a name, if it is open."""
        if name in self._files:
            self._files.pop(name)[0].close()

    def close_unused(self, unused_s: float = UNUSED_S) -> None:
        """Close files that were not used for so many seconds."""
        now = time.monotonic()
        while self._files and now - next(iter(self._files.values()))[1] >= unused_s:
            self._close_oldest()

    def close(self) -> None:
        """Close all."""
        self.close_unused(0.0)

    def _close_oldest(self) -> None:
        self._files.popitem(last=False)[1][0].close()
