"""What lies in an output: lines, chunks, and the two files that are made of them."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.batch.files import Lines
from tandem.batch.input.plan import Chunker, ChunkSize, Position, units
from tandem.batch.input.rows import read_row
from tandem.batch.output.lines import answered, failed, has_failed, reason_of, row_of
from tandem.batch.output.write import Output
from tandem.batch.worker import line_of
from tandem.engine.echo.descriptor import ECHO
from tandem.errors import ConfigError

BODY = b'{"id":"cmpl-1","choices":[{"text":"hey"}],"usage":{"prompt_tokens":3,"completion_tokens":4}}'


def test_an_answer_keeps_the_engines_bytes_and_a_plain_rows_text_stands_beside_them() -> None:
    line = answered(3, None, 200, BODY, plain=True)
    assert json.loads(line.text) == {
        "row": 3, "custom_id": "row-3", "text": "hey", "error": None,
        "response": {"status_code": 200, "request_id": "cmpl-1", "body": json.loads(BODY)},
    }  # fmt: skip
    assert BODY in line.text and b"\n" not in line.text
    assert (line.prompt_tokens, line.completion_tokens) == (3, 4)
    assert "text" not in json.loads(answered(3, "q", 200, BODY, plain=False).text)
    chat = b'{"choices": [{"message": {"content": "hey"}}],\n"usage": null}'
    line = answered(3, "q", 200, chat, plain=True)
    assert json.loads(line.text)["text"] == "hey" and b"\n" not in line.text


@given(st.integers(0, 10**9), st.binary(max_size=60), st.text(max_size=20))
def test_a_line_tells_its_row_and_whether_it_failed_whatever_is_in_it(row: int, raw: bytes, reason: str) -> None:
    bad = failed(row, "x.jsonl line 1", reason, raw)
    good = answered(row, '"error":null}', 200, BODY, plain=True)
    assert row_of(bad.text) == row_of(good.text) == row
    assert has_failed(bad.text) and not has_failed(good.text)
    assert json.loads(bad.text)["error"]["message"] == reason


@pytest.mark.parametrize("body", [b"\x00\x01", b"[1]", b"3", b'{"data": [NaN]}'])
def test_an_answer_that_a_line_cannot_hold_is_that_rows_error(body: bytes) -> None:
    raw = b'{"input":"x","encoding_format":"bytes"}'
    line = line_of(3, "x.jsonl line 4", raw, read_row(json.loads(raw), {}), 200, body, ECHO.requests)
    assert has_failed(line.text)
    assert re.search(f"{len(body)} bytes, is no JSON object", json.loads(line.text)["error"]["message"])


def test_a_line_is_json_whatever_a_row_was() -> None:
    line = failed(3, "x", "no", b'{"prompt": NaN}').text
    assert json.loads(line, parse_constant=pytest.fail)["input"] == '{"prompt": NaN}'


def test_a_row_that_failed_can_be_corrected_from_its_line() -> None:
    row = {"custom_id": "q7", "prompt": "a", "error": None}
    line = failed(7, "x.jsonl line 8", "too long", json.dumps(row).encode(), status=400)
    assert has_failed(line.text)
    assert json.loads(line.text) == {
        "row": 7, "custom_id": "q7", "where": "x.jsonl line 8", "input": row,
        "error": {"code": 400, "message": "too long"},
    }  # fmt: skip


def test_a_row_that_has_no_name_is_called_by_its_number() -> None:
    named = [
        json.loads(failed(7, "x", "no", raw).text)["custom_id"] for raw in (b'{"custom_id":3}', b"{}", b"[1]", b"{")
    ]
    assert named == ["3", "row-7", "row-7", "row-7"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"error":{"message":"no"}}', "no"),
        (b"[]", "[]"),
        (b"plain", "plain"),
        (b'{"message":"x"}', "x"),
        (
            b'{"detail":"Not Found"}',
            "Its model does not answer /v1/embeddings. Ask one that does: some write text, others embed or score it.",
        ),
    ],
)
def test_the_reason_is_what_the_engine_said(body: bytes, reason: str) -> None:
    assert reason_of(body, "/v1/embeddings", lambda message, model: message) == reason


def test_the_two_files_have_every_row_in_order_and_are_there_at_once(tmp_path: Path) -> None:
    output = Output.at(str(tmp_path / "answers"))
    bases = ["a@1", "b@1", "a@1", None, "b@1", "a@1", None]
    chunks = list(Chunker(ChunkSize(4)).chunks(0, ((Position(0, i), 9, base) for i, base in enumerate(bases))))
    every = units(chunks, ["a@1", "b@1"])
    output.begin({"rows": 7})
    output.refuse([failed(row, "x", "why", b"{}").text for row in (3, 6)])
    for unit in every:
        base = ["a@1", "b@1"][unit.base]
        rows = [row for row in range(unit.chunk.first, unit.chunk.first + unit.chunk.rows) if bases[row] == base]
        # The engine refused row 1.
        lines = [answered(r, None, 200, BODY, plain=False) if r != 1 else failed(r, "x", "no", b"{}") for r in rows]
        output.publish(unit.name, [line.text for line in lines])
    assert output.published() >= {unit.name for unit in every}
    assert output.assemble(chunks, every) == (4, 3)
    found = [
        [json.loads(line)["row"] for line in Path(str(f)).read_text().splitlines()]
        for f in (output.results, output.errors)
    ]
    assert found == [[0, 2, 4, 5], [1, 3, 6]]
    output.finish({"rows": 7, "finished": True})
    assert output.manifest() == {"rows": 7, "finished": True} and not output.published()
    assert sorted(p.name for p in (tmp_path / "answers").rglob("*") if p.is_file()) == [
        "errors.jsonl", "manifest.json", "results.jsonl",
    ]  # fmt: skip


def test_rows_that_nobody_is_asked_about_take_no_memory_however_many(tmp_path: Path) -> None:
    lines = Lines()
    tracemalloc.start()
    for row in range(4000):
        lines.add(failed(row, "x", "why", b'"%b"' % (b"x" * 10_000)).text)
    output = Output.at(str(tmp_path))
    output.refuse(lines)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 24 << 20
    assert len(lines) == 4000 and [row_of(line) for line in lines] == list(range(4000))
    lines.add(b'{"row":4000,')
    assert [row_of(line) for line in lines][-1] == 4000
    assert (tmp_path / "run" / "pieces" / "refused.jsonl").read_bytes().count(b"\n") == 4000


def test_an_output_may_be_one_file_and_what_belongs_to_it_lies_beside(tmp_path: Path) -> None:
    output = Output.at(str(tmp_path / "y.jsonl"))
    assert [Path(str(each)).name for each in (output.results, output.errors, output.run)] == [
        "y.jsonl", "y.errors.jsonl", "y.run",
    ]  # fmt: skip
    remote = Output.at("s3://bucket/y/")
    assert (remote.results, remote.run) == ("s3://bucket/y/results.jsonl", "s3://bucket/y/run")


def test_a_file_that_no_run_wrote_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "y.jsonl").write_text("mine\n")
    with pytest.raises(ConfigError, match=r"y.jsonl is there, and no batch run wrote it"):
        Output.at(str(tmp_path / "y.jsonl")).manifest()
    assert Output.at(str(tmp_path / "new")).manifest() is None


def test_a_half_written_piece_is_none(tmp_path: Path) -> None:
    output = Output.at(str(tmp_path))
    output.publish("00000001-0.jsonl", [b"{}"])
    # What a process leaves that is killed in the middle of a write.
    (tmp_path / "run" / "pieces" / ".00000002-0.jsonl.1f.tmp").write_bytes(b'{"row":')
    assert output.published() == {"00000001-0.jsonl"}
    assert output.is_published("00000001-0.jsonl") and not output.is_published("00000002-0.jsonl")
