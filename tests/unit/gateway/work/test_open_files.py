"""Open files are few, whatever is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from tandem.gateway.work.open_files import MOST_OPEN, OpenFiles


def test_the_file_that_was_not_used_for_longest_is_closed_for_another(tmp_path: Path) -> None:
    files, opened = OpenFiles[IO[bytes]](), []

    def open_file(name: str) -> IO[bytes]:
        opened.append((tmp_path / name).open("wb"))
        return opened[-1]

    first = files.get("first", lambda: open_file("first"))
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3 * MOST_OPEN):
        files.get(str(number), lambda: open_file("other"))
        assert files.get("first", lambda: open_file("first")) is first
    assert len(os.listdir("/proc/self/fd")) - before < MOST_OPEN
    assert [file.closed for file in opened].count(False) == len(files) == MOST_OPEN
    files.discard("first")
    assert first.closed
    files.close_unused(3600.0)
    assert len(files) == MOST_OPEN - 1
    files.close()
    assert all(file.closed for file in opened)
