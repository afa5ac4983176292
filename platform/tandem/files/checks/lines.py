"""JSON lines out of chunks of bytes: each line's number and object, or its problem. At most one line is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from pydantic_core import from_json

from tandem.files.checks.report import MOST_FINDINGS, Finding, Report

MAX_LINE_BYTES = 10 * 10**6
BOM = b"\xef\xbb\xbf"

CheckRow = Callable[[int, dict[str, Any]], Iterable[Finding]]


class Line(NamedTuple):
    """One line without its end; `content` None: it is longer than allowed."""

    number: int
    content: bytes | None


def split_lines(chunks: Iterable[bytes], max_bytes: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """The lines of a content, ended by LF or CRLF; the last one may lack its end. A byte order mark at its start is dropped."""
    number, parts, size = 1, list[bytes](), 0
    for chunk in chunks:
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            yield _line(number, parts, piece, size, max_bytes)
            number, parts, size = number + 1, [], 0
        size += len(rest)
        if size > max_bytes + 1:
            parts = []  # counted, and not kept
        else:
            parts.append(rest)
    if size:
        yield _line(number, parts, b"", size, max_bytes)


def _line(number: int, parts: list[bytes], last: bytes, size: int, max_bytes: int) -> Line:
    if size > max_bytes + 1:
        return Line(number, None)
    content = b"".join((*parts, last)).removesuffix(b"\r")
    if number == 1:
        content = content.removeprefix(BOM)
    return Line(number, content if len(content) <= max_bytes else None)


def parse_line(line: Line, max_bytes: int = MAX_LINE_BYTES) -> dict[str, Any] | Finding | None:
    """The object in a line, its problem, or None for a blank line."""
    if line.content is None:
        return _invalid(line, f"The line has more than {max_bytes:,} bytes.", code="line_too_long")
    if not line.content.strip():
        return None
    try:
        line.content.decode()
    except UnicodeDecodeError as error:
        return _invalid(line, f"The line is not UTF-8 at its byte {error.start + 1}.")
    try:
        value = from_json(line.content, allow_inf_nan=False)
    except ValueError as error:
        # The parser's message has the position and what it expected there, and nothing of the content.
        return _invalid(line, f"The line is not valid JSON: {error}.")
    if not isinstance(value, dict):
        return _invalid(line, f"The line must be a JSON object; it is of type {type(value).__name__}.")
    return value


def check_lines(chunks: Iterable[bytes], check_row: CheckRow, *, max_rows: int, what: str) -> Report:
    """A report on all lines: those that are no objects, and what `check_row` finds in the others.

    It ends at the row after `max_rows`; `what`: the rows' name in the plural, such as `requests`.
    """
    num_lines = num_rows = num_findings = 0
    findings: list[Finding] = []
    for line in split_lines(chunks):
        num_lines = line.number
        parsed = parse_line(line)
        if parsed is None:
            continue
        num_rows += 1
        if num_rows > max_rows:
            message = f"The file has more than {max_rows:,} {what}. Split it."
            found: Iterable[Finding] = (Finding(code="too_many_rows", message=message, line=line.number),)
        else:
            found = (parsed,) if isinstance(parsed, Finding) else check_row(line.number, parsed)
        for finding in found:
            num_findings += 1
            if len(findings) < MOST_FINDINGS:
                findings.append(finding)
        if num_rows > max_rows:
            break
    if not num_rows:
        findings, num_findings = [Finding(code="empty_file", message=f"The file has no {what}.")], 1
    return Report(num_lines=num_lines, num_rows=num_rows, findings=tuple(findings), num_findings=num_findings)


def _invalid(line: Line, message: str, code: str = "invalid_json_line") -> Finding:
    return Finding(code=code, message=message, line=line.number)
