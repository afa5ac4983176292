"""Output of a batch run: chunks published atomically, then assembled into two files.

    Y/results.jsonl     answered rows in the input's order        (Y.jsonl, where the output is a file)
    Y/errors.jsonl      the others, each with its reason          (Y.errors.jsonl)
    Y/run/              manifest.json, and until the end pieces/  (Y.run/)

A published chunk is whole, so a run that was killed resumes with the others. The name of a chunk's file says which rows it has,
so that a chunk that is published twice exists once. On disk and in the config a chunk is called a piece, as it always was.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.batch.files import read, reading, remove_partial_files, write, writing
from tandem.batch.input.plan import Chunk, WorkUnit
from tandem.batch.output.lines import has_failed, row_of
from tandem.errors import ConfigError, StorageError
from tandem.storage import Location, check_writable, file_system, join, located, store_errors

REFUSED = "refused.jsonl"
"""Rows that no engine is asked about, among the chunks."""


@dataclass(frozen=True, slots=True)
class Output:
    """The places of a run. Paths, or URIs of one store."""

    results: Location
    errors: Location
    run: Location

    @classmethod
    def at(cls, output: str) -> Output:
        """The places that belong to what a person called the output."""
        place = located(output)
        if str(place).endswith(".jsonl"):
            stem = str(place).removesuffix(".jsonl")
            return cls(*(located(each) for each in (str(place), f"{stem}.errors.jsonl", f"{stem}.run")))
        return cls(*(join(place, each) for each in ("results.jsonl", "errors.jsonl", "run")))

    def manifest(self) -> dict[str, Any] | None:
        """What the run that wrote here wrote down of itself; None if there was none.

        Raises ConfigError if something else is there.
        """
        place = join(self.run, "manifest.json")
        text = read(place)
        if text is None:
            for other in (self.results, self.errors):
                if file_system(other).exists(str(other)):
                    raise ConfigError(
                        f"{other} is there, and no batch run wrote it. Choose another output, or move it away."
                    )
            return None
        try:
            found = json.loads(text)
        except ValueError as error:
            raise StorageError(f"{place} cannot be read: {error}. Choose another output.") from error
        return dict(found)

    def check_made(self) -> None:
        """ConfigError if a file of a finished run is not there any more: the chunks that it was made of are not either."""
        for place in (self.results, self.errors):
            if not file_system(place).exists(str(place)):
                raise ConfigError(
                    f"{place} is gone, and {self.run} says that the run is done. Remove {self.run} too to answer its rows again."
                )

    def owns(self, file: Location) -> bool:
        """Whether a file is one of the run's own, which is no input of it."""
        return file in (self.results, self.errors) or str(file).startswith(f"{self.run}/")

    def make(self) -> None:
        """Make the place for the run's files. StorageError if nothing can be written there."""
        if not isinstance(self.run, Path):
            check_writable(self.run)
            return
        with store_errors(self.run, "made, which the output needs"):
            self.run.mkdir(parents=True, exist_ok=True)
            if not os.access(self.run, os.W_OK | os.X_OK):
                raise StorageError(
                    f"The output's folder {self.run} cannot be written by this user. Choose another --output."
                )

    def begin(self, manifest: dict[str, Any]) -> None:
        """Write the manifest down."""
        write(join(self.run, "manifest.json"), json.dumps(manifest, indent=1).encode())

    def is_begun(self) -> bool:
        """Whether a run's manifest is seen from here."""
        place = join(self.run, "manifest.json")
        return bool(file_system(place).exists(str(place)))

    def publish(self, name: str, lines: Iterable[bytes]) -> None:
        """Put the answers of a unit (plan.WorkUnit.name) there, all of them."""
        write(join(self.run, "pieces", name), b"".join(line + b"\n" for line in lines))

    def keep(self, name: str, lines: Mapping[int, bytes]) -> None:
        """Put the lines of some rows of a unit aside, by their rows, until all of its rows have one."""
        write(self._kept_at(name), b"".join(line + b"\n" for line in lines.values()))

    def kept(self, name: str) -> dict[int, bytes]:
        """The lines of a unit that were put aside, by their rows."""
        text = read(self._kept_at(name)) or b""
        return {row_of(line): line for line in text.split(b"\n") if line}

    def _kept_at(self, name: str) -> Location:
        return join(self.run, "pieces", f"{name}.some")

    def refuse(self, lines: Iterable[bytes]) -> None:
        """Put the rows there that no engine is asked about, all of them."""
        with writing(join(self.run, "pieces", REFUSED)) as file:
            file.writelines(line + b"\n" for line in lines)

    def published(self) -> set[str]:
        """The names of the chunks that are there."""
        place = join(self.run, "pieces")
        files = file_system(place)
        with contextlib.suppress(FileNotFoundError):
            names = (str(each).rpartition("/")[2] for each in files.ls(str(place), detail=False))
            return {name for name in names if name.endswith(".jsonl")}
        return set()

    def is_published(self, name: str) -> bool:
        """Whether they are there."""
        return bool(file_system(self.run).exists(str(join(self.run, "pieces", name))))

    def assemble(self, chunks: Iterable[Chunk], units: Iterable[WorkUnit]) -> tuple[int, int]:
        """Make the two files of the chunks, in the order of rows; how many rows are in each."""
        names: dict[int, list[str]] = {}
        for unit in units:
            names.setdefault(unit.chunk.number, []).append(unit.name)
        refused = _Ahead(self._lines(REFUSED))
        counts = [0, 0]
        with writing(self.results) as results, writing(self.errors) as errors:
            for chunk in chunks:
                held = [self._lines(name) for name in names.get(chunk.number, ())]
                for line in heapq.merge(*held, refused.before(chunk.first + chunk.rows), key=row_of):
                    bad = has_failed(line)
                    counts[bad] += 1
                    (errors if bad else results).write(line + b"\n")
        return counts[0], counts[1]

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write down that the two files are whole; the chunks are needed no more."""
        self.begin(manifest)
        self.clean()

    def clean(self) -> None:
        """Remove what a finished run does not need, also where it was killed while it did so."""
        _remove(join(self.run, "pieces"))
        for place in (self.results, self.errors, join(self.run, "manifest.json")):
            remove_partial_files(place)

    def record_crash(self, text: str) -> None:
        """Keep what a worker said before it ended."""
        with contextlib.suppress(Exception):  # it is about to end in any case
            write(join(self.run, "deaths", f"{uuid.uuid4().hex[:8]}.txt"), text.encode())

    def crashes(self) -> list[str]:
        """What workers said before they ended."""
        place = join(self.run, "deaths")
        files = file_system(place)
        with contextlib.suppress(FileNotFoundError):
            return [files.cat_file(each).decode() for each in files.ls(str(place), detail=False)]
        return []

    def clear_crashes(self) -> None:
        """Those of an earlier start say nothing of this one."""
        _remove(join(self.run, "deaths"))

    def _lines(self, name: str) -> Iterator[bytes]:
        with reading(join(self.run, "pieces", name)) as file:
            for line in file:
                yield line.rstrip(b"\n")


class _Ahead:
    """Lines in order, taken as far as a row."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self._next = next(lines, None)

    def before(self, row: int) -> Iterator[bytes]:
        while self._next is not None and row_of(self._next) < row:
            yield self._next
            self._next = next(self._lines, None)


def _remove(folder: Location) -> None:
    with contextlib.suppress(FileNotFoundError):
        file_system(folder).rm(str(folder), recursive=True)
