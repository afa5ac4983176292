"""Batches are made ready by a thread, which can neither run away nor end without a word."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import pytest

from tandem.data.stream import _Prefetcher


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("error", [OSError("gone"), SystemExit(3)])
def test_whatever_ends_the_making_of_batches_is_raised_where_they_are_taken(depth: int, error: BaseException):
    made: list[Any] = [1, 2]

    def make() -> Any:
        if not made:
            raise error
        return made.pop(0)

    ahead = _Prefetcher(make, 1, depth)
    assert [ahead.next(), ahead.next()] == [1, 2]
    for _ in range(2):
        with pytest.raises(type(error)):
            ahead.next()
    ahead.close()


def test_no_more_batches_are_made_than_may_be_ahead_and_none_after_closing():
    numbers = itertools.count()
    made: list[int] = []

    def make() -> Any:
        made.append(next(numbers))
        return made[-1]

    ahead = _Prefetcher(make, 1, 3)
    assert [ahead.next() for _ in range(5)] == list(range(5))
    # Three lie ready, and one is held by the thread.
    deadline = time.monotonic() + 30
    while len(made) < 9 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made) == 9
    ahead.close()
    assert "rows" not in {thread.name for thread in threading.enumerate()}
    assert len(made) == 9
