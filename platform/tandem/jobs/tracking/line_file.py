"""Lines of a file that another process appends to, read from a line on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tandem.storage import disk_errors


class Line(NamedTuple):
    """A whole line of a file."""

    number: int
    """From 1."""
    text: str
    """Without its end; bytes that are not UTF-8 are replaced."""
    end: int
    """Offset in bytes of what follows it."""


START = Line(0, "", 0)


def lines_after(path: Path, last: Line, number: int, limit: int) -> list[Line]:
    """Lines with numbers above `number`, `limit` at most; none where there is no such file. A line without an end is not whole.

    `last`: a line of the file, or START, from whose end on it is read: `number` is at least its number. StorageError.
    """
    with disk_errors("reading", path):
        # A device has no end to read to.
        return list(itertools.islice(_lines(path, last, number), limit)) if path.is_file() else []


def _lines(path: Path, last: Line, number: int) -> Iterator[Line]:
    with path.open("rb") as file:
        file.seek(last.end)
        end = last.end
        for count, content in enumerate(file, last.number + 1):
            if not content.endswith(b"\n"):
                return
            end += len(content)
            if count > number:
                yield Line(count, content.rstrip(b"\r\n").decode(errors="replace"), end)
