"""Progress of downloads: a bar on a terminal, a line for each tenth elsewhere; both on standard error."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

TENTHS = 10


class Report(Protocol):
    """Receiver of the progress of downloads."""

    def note(self, text: str) -> None:
        """A sentence for the user."""
        ...

    def downloading(
        self, what: str, total_bytes: int, done_bytes: int
    ) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """A download of `total_bytes`, `done_bytes` of them here already; yields a function to call with counts of new bytes."""
        ...


class TerminalReport:
    """Progress on standard error."""

    def note(self, text: str) -> None:
        """See `Report`."""
        from rich.console import Console

        Console(stderr=True, highlight=False).print(text, soft_wrap=True, markup=False)

    @contextlib.contextmanager
    def downloading(self, what: str, total_bytes: int, done_bytes: int) -> Iterator[Callable[[int], None]]:
        """See `Report`."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.table import Column

        console = Console(stderr=True, highlight=False)
        fixed_columns = [Column(no_wrap=True) for _ in range(3)]
        columns = (
            TextColumn("Downloading {task.description}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
            BarColumn(bar_width=8),
            DownloadColumn(binary_units=True, table_column=fixed_columns[0]),
            TransferSpeedColumn(table_column=fixed_columns[1]),
            TimeRemainingColumn(table_column=fixed_columns[2]),
        )
        lock, num_done = threading.Lock(), done_bytes
        resumed = f", {_size(done_bytes)} of it here already" if done_bytes else ""
        if not console.is_terminal:
            console.print(f"Downloading {what}: {_size(total_bytes)}{resumed}", soft_wrap=True, markup=False)
        with Progress(
            *columns, console=console, disable=not console.is_terminal, transient=True, expand=True
        ) as progress:
            task = progress.add_task(what, total=total_bytes, completed=done_bytes)

            def on_bytes(count: int) -> None:
                nonlocal num_done
                with lock:
                    num_before, num_done = num_done, min(num_done + count, total_bytes)
                    tenth = TENTHS * num_done // max(total_bytes, 1)
                    is_next_tenth = not console.is_terminal and tenth > TENTHS * num_before // max(total_bytes, 1)
                progress.update(task, completed=num_done)
                if is_next_tenth:
                    line = f"  {_size(num_done)} of {_size(total_bytes)}"
                    console.print(line, soft_wrap=True, markup=False)

            yield on_bytes
        console.print(f"Downloaded {what}: {_size(total_bytes)}{resumed}", soft_wrap=True, markup=False)


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"
