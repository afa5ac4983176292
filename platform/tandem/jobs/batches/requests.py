"""Requests of a batch in its input file: their places, and their bodies when they are sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from tandem.errors import DataError
from tandem.storage import Location, file_system, store_errors


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One line of the input file."""

    line: int
    """From 1."""
    custom_id: str
    model: str
    offset: int
    """Of the line, in bytes."""
    length: int


class RequestPlace(NamedTuple):
    """Place of a request in the input file, in bytes."""

    offset: int
    length: int

    def __str__(self) -> str:
        return f"{self.offset}:{self.length}"

    @classmethod
    def parse(cls, text: str) -> RequestPlace:
        """The place that `str` wrote."""
        offset, length = text.split(":")
        return cls(int(offset), int(length))


def read_requests(file: IO[bytes]) -> Iterator[BatchRequest]:
    """The requests of a file that has passed the checks of batches (`tandem.files.checks`); blank lines are left out."""
    offset = 0
    for number, raw in enumerate(file, 1):
        if raw.strip():
            request = json.loads(raw)
            yield BatchRequest(
                number, str(request["custom_id"]), str(request["body"].get("model") or ""), offset, len(raw)
            )
        offset += len(raw)


class InputFile:
    """The input file of a batch, open for reads anywhere in it."""

    def __init__(self, location: Location) -> None:
        self._location = location
        with store_errors(location, "read"):
            self._file = file_system(location).open(str(location), "rb")

    def body(self, place: RequestPlace) -> dict[str, Any]:
        """The body of one request; DataError if the file has changed."""
        with store_errors(self._location, "read"):
            self._file.seek(place.offset)
            raw = self._file.read(place.length)
        try:
            return dict(json.loads(raw)["body"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self._location} has changed since the batch was made. Upload the file again.") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()
