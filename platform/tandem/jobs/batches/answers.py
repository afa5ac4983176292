"""Answers of a batch on disk: segments of JSON lines, and the output and error files made of them.

A worker appends answers to a segment of its own and makes them durable before it reports their places to the queue. What was
written and not reported belongs to nobody: the item is answered again, and that answer counts.
"""

from __future__ import annotations

import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, NamedTuple

from tandem.errors import DataError
from tandem.private import make_private_folder
from tandem.storage import disk_errors, store_errors


class AnswerLine(NamedTuple):
    """An answer as a line of the output or error file, without its end."""

    status: int
    """HTTP status."""
    line: bytes


class AnswerPlace(NamedTuple):
    """Place of an answer: a segment's name, and offset and length in bytes; and the answer's HTTP status."""

    segment: str
    offset: int
    length: int
    status: int

    @property
    def is_success(self) -> bool:
        """Whether the answer belongs into the output file, and not into the error file."""
        return self.status < 300

    def __str__(self) -> str:
        return ":".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> AnswerPlace:
        """The place that `str` wrote."""
        segment, offset, length, status = text.rsplit(":", 3)
        return cls(segment, int(offset), int(length), int(status))


class SegmentWriter:
    """A segment of one worker, in the folder of a batch's answers."""

    def __init__(self, folder: Path) -> None:
        with disk_errors("writing answers of a batch", folder):
            make_private_folder(folder)
            self.name = uuid.uuid4().hex
            self._file = os.open(folder / f"{self.name}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._folder, self._end = folder, 0

    def append(self, answers: Iterable[AnswerLine]) -> list[AnswerPlace]:
        """Write lines and make them durable; returns their places. StorageError if the disk is full.

        Where that fails nothing is appended: the next call writes over what got to the disk.
        """
        places, end = [], self._end
        with disk_errors("writing answers of a batch", self._folder):
            for answer in answers:
                places.append(AnswerPlace(self.name, end, len(answer.line), answer.status))
                end = self._write(answer.line + b"\n", end)
            os.fsync(self._file)
        self._end = end
        return places

    def _write(self, content: bytes, offset: int) -> int:
        """Write at an offset; returns the end of what was written."""
        rest = memoryview(content)
        while rest:
            written = os.pwrite(self._file, rest, offset)
            rest, offset = rest[written:], offset + written
        return offset

    def close(self) -> None:
        """End the segment."""
        os.close(self._file)


class SegmentReader:
    """Reads answers by their places; keeps segments open until `close`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}

    def read(self, place: AnswerPlace) -> bytes:
        """One line, without its end. StorageError if it cannot be read, DataError if no line of that length is there."""
        path = self._folder / f"{place.segment}.jsonl"
        with store_errors(path, "read"):
            file = self._files.get(place.segment)
            if file is None:
                file = self._files[place.segment] = path.open("rb")
            file.seek(place.offset)
            line = file.read(place.length + 1)
        if len(line) <= place.length or line.find(b"\n") != place.length:
            raise DataError(f"The answer at {place.offset} in the segment {place.segment} is damaged.")
        return line[:-1]

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


class OutputLines:
    """Lines of a batch's two files: first `answers`, of the output file, then `errors`, of the error file."""

    def __init__(self, ended: Callable[[], Iterable[Ended]], reader: SegmentReader) -> None:
        """`ended`: the requests of the batch, anew in each call, in the order of the input."""
        self.num_answers = self.num_errors = 0
        self._ended = ended
        self._reader = reader
        self._damaged: list[Ended] = []

    def answers(self) -> Iterator[bytes]:
        """A line for each request that was answered with status 2xx."""
        for one in self._ended():
            if one.place is None or not one.place.is_success:
                continue
            try:
                line = self._reader.read(one.place)
            except DataError as error:
                self._damaged.append(replace(one, place=None, error_code="answer_damaged", error=str(error)))
                continue
            self.num_answers += 1
            yield line + b"\n"

    def errors(self) -> Iterator[bytes]:
        """A line for each of the other requests, and for those whose answer could not be read."""
        failed = (one for one in self._ended() if one.place is None or not one.place.is_success)
        for one in itertools.chain(failed, self._damaged):
            self.num_errors += 1
            yield (error_line(one) if one.place is None else self._reader.read(one.place)) + b"\n"


def output_line(item_id: str, custom_id: str, status: int, request_id: str, body: bytes) -> AnswerLine:
    """A line of the output file, or of the error file where `status` is an error's; `body`: the answer's JSON, not parsed."""
    head = json.dumps({"status_code": status, "request_id": request_id})[:-1].encode()
    # Between the values of a JSON text a line end is a space, and within them there is none.
    body = body.replace(b"\r", b" ").replace(b"\n", b" ")
    line = b"".join((_start(item_id, custom_id), b'"response": ', head, b', "body": ', body, b'}, "error": null}'))
    return AnswerLine(status, line)


def error_line(ended: Ended) -> bytes:
    """A line of the error file for a request that has no answer."""
    error = json.dumps({"code": ended.error_code, "message": ended.error}, ensure_ascii=False).encode()
    return b"".join((_start(ended.item_id, ended.custom_id), b'"response": null, "error": ', error, b"}"))


def _start(item_id: str, custom_id: str) -> bytes:
    ids = json.dumps({"id": f"batch_req_{item_id}", "custom_id": custom_id}, ensure_ascii=False)
    return f"{ids[:-1]}, ".encode()
