"""Checks of JSONL contents: problems with their lines, bounds, contents in chunks of any size."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import FileError
from tandem.files.checks import Report, check_batch, check_content, check_training
from tandem.files.checks.batch import MAX_MODELS
from tandem.files.checks.child import ContentCheck
from tandem.files.checks.lines import MAX_LINE_BYTES, split_lines
from tandem.files.checks.report import MOST_FINDINGS
from tandem.files.records import Purpose

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CHAT = {"messages": [USER, ANSWER]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "1", "content": "x"}]
PREFERENCE = {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]}


def jsonl(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def request(custom_id: Any = "1", **fields: Any) -> dict[str, Any]:
    return {
        "custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": {"model": "base"}, **fields,
    }  # fmt: skip


def codes(report: Report) -> list[tuple[int | None, str]]:
    return [(finding.line, finding.code) for finding in report.findings]


@given(st.lists(st.binary(max_size=20)), st.integers(1, 7))
def test_lines_are_the_same_however_the_content_is_cut(lines: list[bytes], size: int) -> None:
    content = b"\n".join(line.replace(b"\n", b"") for line in lines)
    whole = list(split_lines([content], max_bytes=15))
    cut = list(split_lines((content[at : at + size] for at in range(0, len(content), size)), max_bytes=15))
    assert cut == whole
    expected = content.removesuffix(b"\n").split(b"\n") if content else []
    assert [line.number for line in whole] == list(range(1, len(expected) + 1))
    for line, text in zip(whole, expected, strict=True):
        stripped = text.removesuffix(b"\r")
        stripped = stripped.removeprefix(b"\xef\xbb\xbf") if line.number == 1 else stripped
        assert line.content == (stripped if len(stripped) <= 15 else None)


@pytest.mark.parametrize(
    "example",
    [
        CHAT,
        {"messages": [{"role": "system", "content": "s"}, USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]},
        {"messages": [USER, *CALLED, ANSWER], "tools": [TOOL], "parallel_tool_calls": False},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ANSWER]},
        {"prompt": "", "completion": "b"},
        PREFERENCE,
        {**PREFERENCE, "input": {"messages": [USER], "tools": [TOOL], "parallel_tool_calls": True}},
    ],
)  # fmt: skip
def test_examples_of_each_format_are_valid(example: dict[str, Any]) -> None:
    report = check_training([jsonl(example)])
    assert report.is_valid and report.num_rows == 1, report.summary()


@pytest.mark.parametrize(
    ("example", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [USER]}, "messages"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "messages"),
        ({"messages": [{"role": "owner", "content": "a"}, ANSWER]}, "messages[0].role"),
        ({"messages": [{"role": "user"}, ANSWER]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["a"]}, ANSWER]}, "messages[0].content"),
        ({"messages": ["a", ANSWER]}, "messages[0]"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, "messages[0].weight"),
        ({"messages": [USER, {**ANSWER, "weight": 2}]}, "messages[1].weight"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, "messages[1].tool_calls[0]"),
        ({"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}, "messages[1].tool_call_id"),
        ({**CHAT, "tools": {}}, "tools"),
        ({**CHAT, "tools": [{}]}, "tools[0]"),
        ({**CHAT, "tools": [{"function": {"name": "f", "parameters": 1}}]}, "tools[0].function.parameters"),
        ({**CHAT, "parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"prompt": "a"}, "completion"),
        ({"prompt": 1, "completion": "b"}, "prompt"),
        ({"prompt": "a", "completion": ""}, "completion"),
        ({**PREFERENCE, "input": []}, "input"),
        ({**PREFERENCE, "input": {"messages": []}}, "input.messages"),
        ({**PREFERENCE, "preferred_output": [USER]}, "preferred_output"),
        ({"input": {"messages": [USER]}, "preferred_output": [ANSWER]}, "non_preferred_output"),
        ({"text": "a"}, None),
    ],
)
def test_wrong_examples_are_found_with_their_line_and_field(example: dict[str, Any], param: str | None) -> None:
    first = {"prompt": "a", "completion": "b"} if "prompt" in example or "completion" in example else CHAT
    first = PREFERENCE if "input" in example else first
    report = check_training([jsonl(first, example)])
    assert not report.is_valid
    assert (report.findings[0].line, report.findings[0].param) == (2, param), report.summary()


def test_one_file_has_examples_of_one_format() -> None:
    report = check_training([jsonl(CHAT, PREFERENCE)])
    assert codes(report) == [(2, "mixed_formats")] and report.format == "chat"


def test_lines_that_are_no_objects_are_found_with_their_number() -> None:
    content = jsonl(CHAT) + b"\n" + b"{not json}\n[1]\n\xff\xfe\n{}\r\n" + b'{"a": NaN}\n' + b"[" * 5000
    report = check_training([content])
    assert codes(report) == [
        (3, "invalid_json_line"), (4, "invalid_json_line"), (5, "invalid_json_line"), (6, "invalid_example"),
        (7, "invalid_json_line"), (8, "invalid_json_line"),
    ]  # fmt: skip
    assert "Line 3" in report.summary() and "3 more" in report.summary()
    assert "not json" not in report.summary(), "problems do not repeat the content"


def test_a_valid_batch_names_its_models() -> None:
    report = check_batch([jsonl(request("1"), request("2", body={"model": "red"}))])
    assert report.is_valid and report.num_rows == 2 and report.models == {"base": 1, "red": 2}


def test_wrong_requests_of_a_batch_are_found_with_their_line() -> None:
    report = check_batch(
        [
            jsonl(
                request("1"),
                request("1"),
                request(None),
                request("x" * 513),
                request("2", method="GET"),
                request("3", url="/v1/images"),
                request("4", url="/v1/embeddings"),
                request("5", body=[]),
                request("6", body={}),
                request("7", body={"model": ""}),
            )
        ]
    )
    assert codes(report) == [
        (2, "duplicate_custom_id"), (3, "invalid_custom_id"), (4, "invalid_custom_id"), (5, "invalid_method"),
        (6, "invalid_url"), (7, "invalid_url"), (8, "invalid_body"), (9, "missing_model"), (10, "missing_model"),
    ]  # fmt: skip
    assert "line 1 too" in report.findings[0].message
    assert codes(check_batch([jsonl(request())], endpoint="/v1/embeddings")) == [(1, "invalid_url")]


def test_a_batch_names_few_models() -> None:
    requests = [request(str(n), body={"model": f"model-{n % MAX_MODELS}"}) for n in range(3 * MAX_MODELS)]
    assert check_batch([jsonl(*requests)]).is_valid
    report = check_batch([jsonl(*requests, request("one more", body={"model": "another"}))])
    assert codes(report) == [(3 * MAX_MODELS + 1, "too_many_models")] and "'another'" in report.summary()


def test_an_empty_file_is_a_problem() -> None:
    for content in (b"", b"\n\n  \n"):
        assert codes(check_batch([content])) == codes(check_training([content])) == [(None, "empty_file")]


def test_a_batch_has_at_most_50000_requests() -> None:
    def rows(count: int) -> Iterator[bytes]:
        for number in range(count):
            yield b'{"custom_id":"%d","method":"POST","url":"/v1/embeddings","body":{"model":"m"}}\n' % number

    assert check_batch(rows(50_000)).is_valid
    assert codes(check_batch(rows(50_001))) == [(50_001, "too_many_rows")]


def test_findings_are_counted_and_the_first_kept() -> None:
    report = check_training([b"x\n" * 1000])
    assert report.num_findings == 1000 and len(report.findings) == MOST_FINDINGS and "997 more" in report.summary()


def test_a_line_of_10_mb_is_taken_and_a_longer_one_found_in_bounded_memory() -> None:
    def line(size: int) -> Iterable[bytes]:
        frame = b'{"prompt": "", "completion": ""}'
        yield frame[:-2]
        for _ in range((size - len(frame)) // 1000):
            yield b"x" * 1000
        yield b"x" * ((size - len(frame)) % 1000) + frame[-2:]

    assert check_training([*line(MAX_LINE_BYTES), b"\n"]).is_valid
    assert codes(check_training([*line(MAX_LINE_BYTES + 1), b"\n"])) == [(1, "line_too_long")]
    tracemalloc.start()
    report = check_training(
        chunk for part in (line(10 * MAX_LINE_BYTES), [b"\n"], jsonl(CHAT).splitlines()) for chunk in part
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert codes(report) == [(1, "line_too_long")] and report.num_lines == 2
    assert peak < 3 * MAX_LINE_BYTES


@given(st.binary(max_size=300))
def test_no_content_makes_a_check_fail(content: bytes) -> None:
    for purpose in Purpose:
        check_content(purpose, [content])


def test_a_report_is_the_same_after_json() -> None:
    report = check_training([jsonl(CHAT, {}, PREFERENCE)])
    assert Report.from_json(report.to_json()) == report


def test_a_child_process_checks_a_stored_content(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(CHAT, {}))
    assert ContentCheck().run(Purpose.FINE_TUNE, str(path), 60) == check_training([path.read_bytes()])
    with pytest.raises(FileError, match="The content of none could not be checked: it is gone") as failed:
        ContentCheck().run(Purpose.FINE_TUNE, str(tmp_path / "none"), 60)
    assert str(tmp_path) not in str(failed.value)
