"""Retries against storage that is unavailable for a while, with exponential backoff."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from tandem.errors import StorageError
from tandem.observability.events import CheckpointSaved
from tandem.observability.journal import Journal
from tandem.storage import Location, file_system

T = TypeVar("T")

MAX_DELAY_S = 30.0


def backoff_delays(limit_s: float) -> Iterator[float]:
    """Seconds to wait between tries: from 1, doubling up to MAX_DELAY_S, `limit_s` in all."""
    delay_s, waited_s = 1.0, 0.0
    while waited_s < limit_s:
        next_delay_s = min(delay_s, limit_s - waited_s, MAX_DELAY_S)
        yield next_delay_s
        waited_s += next_delay_s
        delay_s *= 2


def retry_storage(
    operation: Callable[[], T],
    *,
    limit_s: float,
    give_up: Callable[[], bool],
    notify: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """The result of `operation`, which is called again for about `limit_s` while it raises StorageError, unless `give_up()`.

    `notify` gets one message at the first failure. Ranks that fail together wait alike: the delays depend on no rank's clock.
    """
    notified = False
    for delay in backoff_delays(limit_s):
        try:
            return operation()
        except StorageError as error:
            if give_up():
                raise
            if not notified:
                notify(f"{error} It is tried again for {limit_s:g} s.")
                notified = True
            sleep(delay)
    return operation()


def wait_for_storage(
    root: Location, journal: Journal, limit_s: float, *, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Wait until the folder of a job's checkpoints can be read, if the journal says that there are any.

    Raises StorageError after `limit_s`: a run must not start over because its checkpoints are unreachable.
    """
    step = next((e.step for e in reversed(journal.read()) if isinstance(e, CheckpointSaved)), None)
    if step is None:
        return

    def check() -> None:
        try:
            problem = "" if file_system(root).isdir(str(root)) else "is not there"
        except Exception as error:  # noqa: BLE001 - a store's client has errors of its own
            problem = f"cannot be reached ({type(error).__name__}: {error})"
        if problem:
            raise StorageError(
                f"{root} {problem}, though a checkpoint of step {step} was written below it. Bring the storage back, then run "
                "the same command again; or make the folder, empty, to start over."
            )

    retry_storage(
        check,
        limit_s=limit_s,
        give_up=lambda: isinstance(root, Path) and root.is_file(),
        notify=journal.notice,
        sleep=sleep,
    )
