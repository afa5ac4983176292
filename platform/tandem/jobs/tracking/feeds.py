"""Feeds: sequences that grow while they are read, such as a running job's events or the lines of its log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk(Generic[T]):
    """The next items of a feed."""

    items: list[T]
    has_more: bool
    """Whether more are there already."""
    ended: bool
    """Whether none will follow."""


class Feed(Protocol[T]):
    """A reader at a place of a sequence."""

    def next(self) -> Chunk[T]:
        """The items since the last call, a bounded number; blocks for the time of a read, not until there are any."""
        ...
