"""Requests are found again in the input file, and answers in the segments of their workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from openai.types import Batch as SdkBatch

from tandem.api.openai.batches import Batch, BatchCreation, BatchError, BatchErrors
from tandem.errors import DataError, StorageError
from tandem.jobs.batches.answers import (
    AnswerPlace,
    Ended,
    SegmentReader,
    SegmentWriter,
    lines_of,
    output_line,
)
from tandem.jobs.batches.requests import InputFile, RequestPlace, read_requests


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
    assert [(request.line, request.custom_id, request.model) for request in requests] == [
        (1, "a", "m"),
        (3, "b", "m"),
        (4, "c", "m"),
    ]
    input_file = InputFile(path)
    places = [RequestPlace.parse(str(RequestPlace(request.offset, request.length))) for request in requests]
    assert [len(input_file.body(place)["prompt"]) for place in reversed(places)] == [5, 1000, 5]
    with pytest.raises(DataError, match="has changed since the batch was made"):
        input_file.body(RequestPlace(3, 10))
    input_file.close()


def test_answers_of_several_workers_become_an_output_and_an_error_file(tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    first, second = SegmentWriter(folder), SegmentWriter(folder)
    (a,) = first.append([output_line("1", "a", 200, "req-1", {"text": "é\n"})])
    b, c = second.append([output_line("2", "b", 400, "req-2", {"error": {}}), output_line("3", "c", 200, "req-3", {})])
    (d,) = first.append([output_line("4", "d", 200, "req-4", {})])
    for writer in (first, second):
        writer.close()
    ended = [
        Ended(item_id="4", custom_id="d", place=AnswerPlace.parse(str(d))),
        Ended(item_id="2", custom_id="b", place=b),
        Ended(item_id="1", custom_id="a", place=a),
        Ended(item_id="5", custom_id="e", error_code="batch_expired", error="Too late."),
        Ended(item_id="3", custom_id="c", place=c),
    ]
    reader = SegmentReader(folder)
    lines = [(answered, json.loads(text)) for answered, text in lines_of(ended, reader)]
    reader.close()
    assert [(answered, content["custom_id"]) for answered, content in lines] == [
        (True, "d"),
        (False, "b"),
        (True, "a"),
        (False, "e"),
        (True, "c"),
    ]
    assert lines[2][1]["response"]["body"] == {"text": "é\n"} and lines[2][1]["error"] is None
    assert lines[3][1]["error"] == {"code": "batch_expired", "message": "Too late."} and lines[3][1]["response"] is None
    assert {oct(path.stat().st_mode)[-3:] for path in folder.iterdir()} == {"600"}


def test_a_segment_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="gone.jsonl cannot be read"):
        SegmentReader(tmp_path).read(AnswerPlace("gone", 0, 3))


def test_the_sdk_reads_a_batch() -> None:
    errors = BatchErrors(data=[BatchError(code="invalid_url", message="m", line=3)])
    batch = Batch(
        id="batch_1", endpoint="/v1/completions", input_file_id="file-1", status="failed", created_at=1, errors=errors
    )
    read = SdkBatch.model_validate(batch.model_dump())
    assert read.errors is not None and read.errors.data is not None and read.errors.data[0].line == 3
    request = {"completion_window": "24h", "endpoint": "/v1/embeddings", "input_file_id": "file-1"}
    assert BatchCreation.model_validate(request).endpoint == "/v1/embeddings"
