"""Answers of one batch by row, from its output and error file, on this machine's disk."""

from __future__ import annotations

import tempfile
from types import TracebackType
from typing import Any, Self

from pydantic_core import from_json

from tandem.api.openai.batches import Batch
from tandem.batch.app.api import BatchApi
from tandem.batch.app.lines import number_of


class BatchAnswers:
    """The lines of both files of a batch that has ended; close it by a `with` block."""

    def __init__(self, api: BatchApi, batch: Batch) -> None:
        """Download them. Raises a TandemError if the app does not answer."""
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - as long as they are
        self._places: dict[int, tuple[int, int]] = {}
        try:
            for file_id in (batch.output_file_id, batch.error_file_id):
                if file_id is not None:
                    begin = self._file.tell()
                    api.download(file_id, self._file)
                    self._index(begin)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def get(self, row: int) -> dict[str, Any] | None:
        """The line of a row; None if there is none."""
        if row not in self._places:
            return None
        offset, length = self._places[row]
        self._file.seek(offset)
        return dict(from_json(self._file.read(length)))

    def _index(self, begin: int) -> None:
        self._file.seek(begin)
        offset = begin
        for line in self._file:
            if line.strip():
                self._places[number_of(from_json(line))] = (offset, len(line))
            offset += len(line)
