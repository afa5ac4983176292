"""Storage that refuses for a while: what is written is tried again, and no run begins anew because its checkpoints are away."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from tandem.errors import StorageError
from tandem.observability.journal import Journal
from tandem.storage import Location, file_system

T = TypeVar("T")

MAX_DELAY_S = 30.0


def backoff_delays(limit_s: float) -> Iterator[float]:
    """Seconds to wait between tries, each twice the one before and at most half a minute, `limit_s` in all."""
    delay, spent = 1.0, 0.0
    while spent < limit_s:
        this = min(delay, limit_s - spent, MAX_DELAY_S)
        yield this
        spent += this
        delay *= 2


def retry_storage(
    write: Callable[[], T],
    *,
    limit_s: float,
    give_up: Callable[[], bool],
    tell: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """What `write` returns; while it raises StorageError it is tried again, for about `limit_s`, unless it is `give_up`.

    Ranks that write together, and fail together, wait alike: no rank's clock decides.
    """
    told = False
    for delay in backoff_delays(limit_s):
        try:
            return write()
        except StorageError as error:
            if give_up():
                raise
            if not told:
                tell(f"{error} It is tried again for {limit_s:g} s.")
                told = True
            sleep(delay)
    return write()


def wait_for_storage(
    root: Location, journal: Journal, limit_s: float, *, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Return once the place of a job's checkpoints is there, if there were any; StorageError after `limit_s`."""
    step = next((e["step"] for e in reversed(journal.read()) if e["event"] == "checkpoint"), None)
    if step is None:
        return

    def look() -> None:
        try:
            missing = "" if file_system(root).isdir(str(root)) else "is not there"
        except Exception as error:  # noqa: BLE001 - a store's client has errors of its own
            missing = f"cannot be reached ({type(error).__name__}: {error})"
        if missing:
            raise StorageError(
                f"{root} {missing}, though a checkpoint of step {step} was written below it. Bring the storage back, then run "
                "the same command again; or make the folder, empty, to begin from the start."
            )

    retry_storage(
        look,
        limit_s=limit_s,
        give_up=lambda: isinstance(root, Path) and root.is_file(),
        tell=lambda message: journal.write({"event": "notice", "message": message}),
        sleep=sleep,
    )
