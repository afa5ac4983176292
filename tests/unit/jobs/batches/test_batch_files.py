"""Requests are found again in the input file, and answers in the segments of their workers."""

from __future__ import annotations

import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from openai.types import Batch as SdkBatch

from tandem.api.openai.batches import Batch, BatchCreation, BatchError, BatchErrors
from tandem.errors import DataError, StorageError
from tandem.jobs.batches.answers import (
    AnswerLine,
    AnswerPlace,
    Ended,
    OutputLines,
    SegmentReader,
    SegmentWriter,
    output_line,
)
from tandem.jobs.batches.requests import InputFile, RequestPlace, list_requests, read_requests


def line(custom_id: str, text: str = "naïve") -> str:
    body = {"model": "m", "prompt": text}
    return json.dumps(
        {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}, ensure_ascii=False
    )


def test_each_request_is_read_again_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "input.jsonl"
    path.write_text(f"{line('a')}\n\n{line('b', 'é' * 1000)}\r\n{line('c')}")
    with path.open("rb") as file:
        requests = list(read_requests(file))
    assert list(list_requests(str(path))) == requests
    assert [(request.line, request.custom_id, request.model) for request in requests] == [
        (1, "a", "m"),
        (3, "b", "m"),
        (4, "c", "m"),
    ]
    input_file = InputFile(path)
    places = [RequestPlace.parse(str(RequestPlace(request.offset, request.length))) for request in requests]
    assert [len(input_file.body(place)["prompt"]) for place in reversed(places)] == [5, 1000, 5]
    with pytest.raises(DataError, match="has changed since the batch was made") as changed:
        input_file.body(RequestPlace(3, 10))
    assert str(tmp_path) not in str(changed.value)
    input_file.close()


def test_a_file_of_requests_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"^gone.jsonl could not be read for its requests: it is gone"):
        list(list_requests(str(tmp_path / "gone.jsonl")))


def answer(number: str, custom_id: str, status: int, request_id: str, body: Any) -> AnswerLine:
    return output_line(number, custom_id, status, request_id, json.dumps(body, ensure_ascii=False, indent=1).encode())


def lines_of(folder: Path, ended: Sequence[Ended]) -> tuple[list[Any], list[Any]]:
    """The lines of the output and of the error file."""
    reader = SegmentReader(folder)
    lines = OutputLines(lambda: ended, reader)
    found = ([json.loads(each) for each in lines.answers()], [json.loads(each) for each in lines.errors()])
    reader.close()
    assert (lines.num_answers, lines.num_errors) == tuple(map(len, found))
    return found


def test_answers_of_several_workers_become_an_output_and_an_error_file(tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    first, second = SegmentWriter(folder), SegmentWriter(folder)
    (a,) = first.append([answer("1", "a", 200, "req-1", {"text": "é\n"})])
    b, c = second.append([answer("2", "b", 400, "req-2", {"error": {}}), answer("3", "c", 200, "req-3", {})])
    (d,) = first.append([answer("4", "d", 200, "req-4", {})])
    for writer in (first, second):
        writer.close()
    ended = [
        Ended(item_id="4", custom_id="d", place=AnswerPlace.parse(str(d))),
        Ended(item_id="2", custom_id="b", place=b),
        Ended(item_id="1", custom_id="a", place=a),
        Ended(item_id="5", custom_id="e", error_code="batch_expired", error="Too late."),
        Ended(item_id="3", custom_id="c", place=c),
    ]
    answers, errors = lines_of(folder, ended)
    assert [line["custom_id"] for line in answers] == ["d", "a", "c"]
    assert [line["custom_id"] for line in errors] == ["b", "e"]
    assert answers[1] == {
        "id": "batch_req_1",
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "req-1", "body": {"text": "é\n"}},
        "error": None,
    }
    assert errors[1]["error"] == {"code": "batch_expired", "message": "Too late."} and errors[1]["response"] is None
    assert {oct(path.stat().st_mode)[-3:] for path in folder.iterdir()} == {"600"}


def test_answers_after_a_full_disk_are_where_the_segment_says(tmp_path: Path) -> None:
    segment = SegmentWriter(tmp_path)
    lines = [answer(str(n), f"id-{n}", 200, "r", {"text": str(n) * 15_000}) for n in range(4)]
    places = segment.append(lines[:1])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            segment.append(lines[1:3])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    places += segment.append(lines[3:]) + segment.append(lines[1:3])
    segment.close()
    ended = [
        Ended(item_id=str(n), custom_id=f"id-{n}", place=place) for n, place in zip((0, 3, 1, 2), places, strict=True)
    ]
    answers, errors = lines_of(tmp_path, ended)
    assert [line["response"]["body"]["text"][0] for line in answers] == ["0", "3", "1", "2"] and errors == []


def test_a_damaged_answer_is_an_error_of_its_request_alone(tmp_path: Path) -> None:
    segment = SegmentWriter(tmp_path)
    places = segment.append([answer(str(n), f"id-{n}", 200, "r", {"n": n}) for n in range(3)])
    segment.close()
    wrong = places[1]._replace(offset=places[1].offset - 5)
    cut = places[2]._replace(length=places[2].length + 100)
    ended = [Ended(item_id=str(n), custom_id=f"id-{n}", place=place) for n, place in enumerate((places[0], wrong, cut))]
    answers, errors = lines_of(tmp_path, ended)
    assert [line["custom_id"] for line in answers] == ["id-0"]
    assert [(line["custom_id"], line["error"]["code"]) for line in errors] == [
        ("id-1", "answer_damaged"),
        ("id-2", "answer_damaged"),
    ]


def test_a_segment_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="gone.jsonl cannot be read"):
        SegmentReader(tmp_path).read(AnswerPlace("gone", 0, 3, 200))


def test_the_sdk_reads_a_batch() -> None:
    errors = BatchErrors(data=[BatchError(code="invalid_url", message="m", line=3)])
    batch = Batch(
        id="batch_1", endpoint="/v1/completions", input_file_id="file-1", status="failed", created_at=1, errors=errors
    )
    read = SdkBatch.model_validate(batch.model_dump())
    assert read.errors is not None and read.errors.data is not None and read.errors.data[0].line == 3
    request = {"completion_window": "24h", "endpoint": "/v1/embeddings", "input_file_id": "file-1"}
    assert BatchCreation.model_validate(request).endpoint == "/v1/embeddings"
