"""Streaming parser of multipart/form-data with one file: its bytes go to a sink as they arrive, fields are kept within bounds.

Pure; python-multipart splits the parts (RFC 7578). A field may come before or after the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from tandem.gateway.errors import ApiError

MAX_FIELDS, MAX_FIELD_BYTES = 16, 4096
"""Fields beside the file, and bytes of one of them."""
MAX_HEADERS, MAX_HEADER_BYTES = 16, 8192
"""Headers of one part, and bytes of one of them."""
FRAME_BYTES = 128 * 1024
"""Bytes that boundaries, headers and fields of a body may have beside the file."""

Sink = Callable[[bytes], None]
CheckField = Callable[[str, str], None]


@dataclass(kw_only=True, slots=True)
class Form:
    """The fields of a form, and what is known of its file."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    """None: the file has no name."""
    has_file: bool = False
    file_bytes: int = 0


class FormReader:
    """Reads one body: `feed` its chunks, then `end`."""

    def __init__(
        self,
        boundary: bytes,
        *,
        file_field: str,
        sink: Sink,
        max_file_bytes: int,
        check_field: CheckField | None = None,
    ) -> None:
        """`file_field`: name of the field with the file; `sink` gets its bytes.

        `check_field` gets the name and value of each other field as soon as it is whole, and may raise an ApiError.
        """
        self.form = Form()
        self._file_field = file_field
        self._sink = sink
        self._max_file_bytes = max_file_bytes
        self._check_field = check_field
        self._header_name = self._header_value = b""
        self._disposition = b""
        self._field_name: str | None = None
        """Name of the field that is being read; None: the file."""
        self._value = bytearray()
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._read_header_name,
                    "on_header_value": self._read_header_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._read_data,
                    "on_part_end": self._end_part,
                    "on_end": self._end_form,
                },
                max_header_count=MAX_HEADERS,
                max_header_size=MAX_HEADER_BYTES,
            )
        except FormParserError as error:
            raise _form_error(str(error)) from None

    def feed(self, chunk: bytes) -> None:
        """Read a chunk; ApiError 400 for what is no form, 413 as soon as the file is too large."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _form_error(str(error)) from None

    def end(self) -> Form:
        """The form; ApiError 400 if it is not whole or has no file."""
        if not self._ended:
            raise _form_error("its last boundary is missing")
        if not self.form.has_file:
            raise ApiError(400, f"`{self._file_field}` is missing: the file to upload.", param=self._file_field)
        return self.form

    def _begin_part(self) -> None:
        self._disposition = self._header_name = self._header_value = b""
        self._value.clear()

    def _read_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _read_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _end_headers(self) -> None:
        kind, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode(errors="replace")
        if kind != b"form-data" or not name:
            raise _form_error("a part has no name")
        if name == self._file_field:
            if self.form.has_file:
                raise ApiError(400, f"The form has `{name}` twice.", param=name)
            self.form.has_file, self._field_name = True, None
            if b"filename" in options:
                self.form.filename = options[b"filename"].decode(errors="replace")
            return
        if name in self.form.fields or len(self.form.fields) >= MAX_FIELDS:
            raise ApiError(400, f"The form has `{name[:40]}` twice, or more than {MAX_FIELDS} fields.", param=name)
        self._field_name = name
        self.form.fields[name] = ""

    def _read_data(self, data: bytes, start: int, end: int) -> None:
        if self._field_name is not None:
            self._value += data[start:end]
            if len(self._value) > MAX_FIELD_BYTES:
                raise ApiError(
                    400, f"`{self._field_name[:40]}` has more than {MAX_FIELD_BYTES} bytes.", param=self._field_name
                )
            return
        self.form.file_bytes += end - start
        if self.form.file_bytes > self._max_file_bytes:
            raise too_large_error(self._max_file_bytes)
        self._sink(data[start:end])

    def _end_part(self) -> None:
        if self._field_name is not None:
            try:
                value = self.form.fields[self._field_name] = self._value.decode()
            except UnicodeDecodeError:
                raise ApiError(400, f"`{self._field_name[:40]}` is not UTF-8.", param=self._field_name) from None
            if self._check_field is not None:
                self._check_field(self._field_name, value)

    def _end_form(self) -> None:
        self._ended = True


def boundary_of(content_type: str) -> bytes:
    """The boundary in a Content-Type header; ApiError 415 unless it is a form's."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise ApiError(
            415,
            f"The request has Content-Type: {content_type[:40]!a}; send a form with the file as multipart/form-data.",
            code="unsupported_content_type",
        )
    return options[b"boundary"]


def too_large_error(max_bytes: int) -> ApiError:
    """413 for a file that is too large."""
    return ApiError(
        413, f"The file has more than {max_bytes:,} bytes; at most {max_bytes:,} are taken here.", param="file"
    )


def _form_error(reason: str) -> ApiError:
    return ApiError(400, f"The request body is no valid multipart/form-data: {reason[:200].rstrip('.')}.")
