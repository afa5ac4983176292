"""Forms with a file, in chunks of any size: the same fields and bytes however they are cut, and no crash whatever they are."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.gateway.errors import ApiError
from tandem.gateway.requests.multipart import Form, FormReader, boundary_of

BOUNDARY = b"bound"
NEAR_BOUNDARIES = st.lists(
    st.sampled_from([b"\r\n", b"--bound", b"\r\n--boun", b"\r\n--bounds", b"-", b"\r", b"x", b"\n", b"\0"])
)


def read(body: bytes, size: int, max_file_bytes: int = 10_000) -> tuple[Form, bytes]:
    content = bytearray()
    reader = FormReader(BOUNDARY, file_field="file", sink=content.extend, max_file_bytes=max_file_bytes)
    for start in range(0, len(body), size):
        reader.feed(body[start : start + size])
    return reader.end(), bytes(content)


def part(name: str, value: bytes, filename: str | None = None) -> bytes:
    suffix = "" if filename is None else f'; filename="{filename}"'
    head = f'--bound\r\nContent-Disposition: form-data; name="{name}"{suffix}\r\nContent-Type: text/plain\r\n\r\n'
    return head.encode() + value + b"\r\n"


@given(NEAR_BOUNDARIES.map(b"".join), st.integers(1, 40), st.booleans())
def test_a_file_arrives_as_it_was_sent_however_it_is_cut(content: bytes, size: int, file_first: bool) -> None:
    # What a boundary begins on a line of its own is the end of a part, so no sender has it in a file.
    content = content.replace(b"\r\n--bound", b"")
    if content.startswith(b"--bound") or b"\r\n--bound" in b"\r\n" + content + b"\r\n":
        return
    parts = [part("file", content, "a b.txt"), part("purpose", b"batch")]
    form, found = read(b"".join(parts if file_first else parts[::-1]) + b"--bound--\r\n", size)
    assert found == content and form.file_bytes == len(content)
    assert (form.filename, form.fields) == ("a b.txt", {"purpose": "batch"})


@given(st.binary(max_size=400), st.integers(1, 50))
def test_no_body_is_more_than_a_refusal(body: bytes, size: int) -> None:
    for whole in (body, part("file", b"x", "a") + body, b"--bound\r\n" + body):
        with contextlib.suppress(ApiError):
            read(whole, size)


def test_fields_and_files_are_bounded() -> None:
    end = b"--bound--\r\n"
    for body, status in (
        (part("file", b"x" * 10_001, "a") + end, 413),
        (part("purpose", b"x" * 5000) + end, 400),
        (b"".join(part(f"f{n}", b"") for n in range(17)) + end, 400),
        (part("a", b"1") + part("a", b"2") + end, 400),
        (part("purpose", b"\xff") + part("file", b"x") + end, 400),
        (part("file", b"x"), 400),
        (b"--bound\r\nContent-Type: text/plain\r\n\r\nx\r\n" + end, 400),
        (b"--bound\r\n" + b"X: y\r\n" * 17 + b"\r\nx\r\n" + end, 400),
    ):
        with pytest.raises(ApiError) as caught:
            read(body, 100)
        assert caught.value.status == status


def test_a_boundary_is_read_from_the_content_type() -> None:
    assert boundary_of('multipart/form-data; boundary="a b"') == b"a b"
    for content_type in ("", "application/json", "multipart/form-data", "multipart/mixed; boundary=b"):
        with pytest.raises(ApiError) as caught:
            boundary_of(content_type)
        assert caught.value.status == 415
