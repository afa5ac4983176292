"""Answers of a batch on disk: segments of JSON lines, and the output and error files made of them.

A worker appends answers to a segment of its own and makes them durable before it reports their places to the queue. What was
written and not reported belongs to nobody: the item is answered again, and that answer counts.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from tandem.private import make_private_folder
from tandem.storage import disk_errors, store_errors


class AnswerPlace(NamedTuple):
    """Place of an answer: a segment's name, and offset and length in bytes."""

    segment: str
    offset: int
    length: int

    def __str__(self) -> str:
        return f"{self.segment}:{self.offset}:{self.length}"

    @classmethod
    def parse(cls, text: str) -> AnswerPlace:
        """The place that `str` wrote."""
        segment, offset, length = text.rsplit(":", 2)
        return cls(segment, int(offset), int(length))


class SegmentWriter:
    """A segment of one worker, in the folder of a batch's answers."""

    def __init__(self, folder: Path) -> None:
        with disk_errors("writing answers of a batch", folder):
            make_private_folder(folder)
            self.name = uuid.uuid4().hex
            descriptor = os.open(folder / f"{self.name}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._folder, self._offset = folder, 0
        self._file = os.fdopen(descriptor, "wb")

    def append(self, answers: Iterable[bytes]) -> list[AnswerPlace]:
        """Write lines and make them durable; returns their places. StorageError if the disk is full."""
        places = []
        with disk_errors("writing answers of a batch", self._folder):
            for answer in answers:
                self._file.write(answer + b"\n")
                places.append(AnswerPlace(self.name, self._offset, len(answer)))
                self._offset += len(answer) + 1
            self._file.flush()
            os.fsync(self._file.fileno())
        return places

    def close(self) -> None:
        """End the segment."""
        self._file.close()


class SegmentReader:
    """Reads answers by their places; keeps segments open until `close`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}

    def read(self, place: AnswerPlace) -> bytes:
        """One line, without its end. StorageError if it cannot be read."""
        path = self._folder / f"{place.segment}.jsonl"
        with store_errors(path, "read"):
            file = self._files.get(place.segment)
            if file is None:
                file = self._files[place.segment] = path.open("rb")
            file.seek(place.offset)
            return file.read(place.length)

    def close(self) -> None:
        """Close the segments."""
        for file in self._files.values():
            file.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """One request of a batch that has ended."""

    item_id: str
    custom_id: str
    place: AnswerPlace | None = None
    """Of the answer; None: it has none."""
    error_code: str = ""
    error: str = ""


def output_line(item_id: str, custom_id: str, status: int, request_id: str, body: Any) -> bytes:
    """A line of the output file, or of the error file where `status` is an error's."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return _line(item_id, custom_id, response=response, error=None)


def error_line(ended: Ended) -> bytes:
    """A line of the error file for a request that has no answer."""
    error = {"code": ended.error_code, "message": ended.error}
    return _line(ended.item_id, ended.custom_id, response=None, error=error)


def is_answered(line: bytes) -> bool:
    """Whether a line belongs into the output file: the request was answered with status 2xx."""
    response = json.loads(line)["response"]
    return response is not None and response["status_code"] < 300


def lines_of(ended: Iterable[Ended], reader: SegmentReader) -> Iterator[tuple[bool, bytes]]:
    """(answered, line) of each request, in the order given."""
    for one in ended:
        line = error_line(one) if one.place is None else reader.read(one.place)
        yield one.place is not None and is_answered(line), line


def _line(item_id: str, custom_id: str, **content: Mapping[str, Any] | None) -> bytes:
    return json.dumps({"id": f"batch_req_{item_id}", "custom_id": custom_id, **content}, ensure_ascii=False).encode()
