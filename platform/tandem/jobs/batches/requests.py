"""Requests of a batch in its input file: their places, and their bodies when they are sent.

`python -m tandem.jobs.batches.requests LOCATION` lists the requests for `list_requests`, one JSON line each.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import subprocess
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from tandem.api.bounded_json import TooManyValuesError, parse_object
from tandem.errors import DataError, StorageError
from tandem.files.content import READ_BYTES, open_content
from tandem.settings import child_environment
from tandem.storage import Location, base_name, file_system, store_errors

log = logging.getLogger(__name__)


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


def list_requests(location: str) -> Generator[BatchRequest]:
    """The requests of a checked file, read in a child process: its lines may have 10 MB, and parsing holds the interpreter.

    StorageError if the file cannot be read.
    """
    with subprocess.Popen(
        [sys.executable, "-m", __name__, location],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=child_environment(),
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        try:
            for line in child.stdout:
                yield BatchRequest(*json.loads(line))
            errors = child.stderr.read()
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        last_line = errors.decode(errors="replace").strip().rpartition("\n")[2]
        log.warning("The listing of the requests in %s ended with %d: %s", location, child.returncode, last_line[:300])
        # Without the location: the tenant reads this.
        raise StorageError(
            f"{base_name(location)} could not be read for its requests: it is gone, or its store does not answer."
        )


class InputFile:
    """The input file of a batch, open for reads anywhere in it."""

    def __init__(self, location: Location) -> None:
        self._location = location
        with store_errors(location, "read"):
            self._file = file_system(location).open(str(location), "rb")

    def body(self, place: RequestPlace) -> dict[str, Any]:
        """The body of one request; DataError if the file has changed, TooManyValuesError as for a request of a client."""
        with store_errors(self._location, "read"):
            self._file.seek(place.offset)
            raw = self._file.read(place.length)
        try:
            return dict(parse_object(raw)["body"])
        except TooManyValuesError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{base_name(self._location)} has changed since the batch was made. Upload the file again."
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


if __name__ == "__main__":
    with open_content(sys.argv[1]) as content:
        # A local content is not buffered: reading its lines would ask for each byte.
        buffered = io.BufferedReader(content, READ_BYTES) if isinstance(content, io.RawIOBase) else content
        for each in read_requests(buffered):
            print(json.dumps(dataclasses.astuple(each)))
