"""Storage that refuses for a while: what is written is tried again, and no run begins anew because its checkpoints are away."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from tandem.checkpoint import folders
from tandem.errors import StorageError
from tandem.observability.journal import Journal
from tandem.storage import Location

T = TypeVar("T")

LONGEST_S = 30.0


def delays(limit_s: float) -> Iterator[float]:
    """Seconds to wait between tries, each twice the one before and at most half a minute, `limit_s` in all."""
    delay, spent = 1.0, 0.0
    while spent < limit_s:
        this = min(delay, limit_s - spent, LONGEST_S)
        yield this
        spent += this
        delay *= 2


def persistently(
    write: Callable[[], T],
    *,
    limit_s: float,
    hopeless: Callable[[], bool],
    tell: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """What `write` returns; while it raises StorageError it is tried again, for about `limit_s`, unless it is `hopeless`.

    Ranks that write together, and fail together, wait alike: no rank's clock decides.
    """
    told = False
    for delay in delays(limit_s):
        try:
            return write()
        except StorageError as error:
            if hopeless():
                raise
            if not told:
                tell(f"{error} It is tried again for {limit_s:g} s.")
                told = True
            sleep(delay)
    return write()


def wait_for_storage(
    root: Location, journal: Journal, limit_s: float, *, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Return once the folder of a job's checkpoints is there, if there were any; StorageError after `limit_s`."""
    step = next((e["step"] for e in reversed(journal.read()) if e["event"] == "checkpoint"), None)
    if step is None:
        return

    def look() -> None:
        if not isinstance(root, Path):
            folders.saved(root)
        elif not root.is_dir():
            raise StorageError(
                f"{root} is not there, though a checkpoint of step {step} was written below it. Bring the storage back, then run "
                "the same command again; or make the folder, empty, to begin from the start."
            )

    persistently(
        look,
        limit_s=limit_s,
        hopeless=lambda: isinstance(root, Path) and root.is_file(),
        tell=lambda message: journal.write({"event": "notice", "message": message}),
        sleep=sleep,
    )
