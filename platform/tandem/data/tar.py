"""Reader of tar files of samples (WebDataset shards): members with their positions, grouped and decoded by `webdataset`.

The members are read here, and not by `webdataset.tariterators.tar_file_iterator`, because that

- starts at the beginning of a file only; a batch run goes on at any sample;
- takes a damaged header behind the first member for the end of the file, so a damaged shard would pass as a shorter one;
- imports torch, which a task that packs shards of ours would otherwise not load.

Keys, extensions, decoding (`foreign_samples`) and writing (`tandem.data.shards`) are the library's.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple, Self, cast

TEXT_EXTENSIONS = ("txt", "text", "md")
EXTENSIONS = frozenset(
    extension + packed for extension in ("json", "jsonl", "cls", "npy", *TEXT_EXTENSIONS) for packed in ("", ".gz")
)
"""Members that are read; what else a sample has, such as an image, is passed over."""
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst")
METADATA = re.compile(r"__[^/]*__($|/)")
"""Names of members that are no samples, as `webdataset.tariterators` has it."""
SKIPPED_BYTES = 2**20
"""Bytes of each read that skips to a position in a file that cannot seek."""


class Member(NamedTuple):
    """A file in a tar file."""

    name: str
    offset: int
    """Position of its header in the unpacked tar file."""
    data: bytes


class TarSample(NamedTuple):
    """Members whose names are alike up to the first dot of the last part."""

    key: str
    offset: int
    """Position of its first member; `foreign_samples` can start there."""
    fields: dict[str, bytes]
    """The content of its members by extension, in lower case, those of `EXTENSIONS` only."""


READ_ERRORS = (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError)
"""Exceptions when a damaged or truncated tar file is read, compressed or not."""


def decompress_stream(file: IO[bytes]) -> IO[bytes]:
    """The content of a file that may be compressed with gzip, zstd, bzip2 or xz, by its first bytes."""
    start = file.read(6)
    file.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file, mode="rb"))
    if start.startswith(b"BZh"):
        return bz2.BZ2File(file)
    if start == b"\xfd7zXZ\0":
        return lzma.LZMAFile(file)
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow as pa

        return cast(IO[bytes], pa.CompressedInputStream(file, "zstd"))
    return file


def members(file: IO[bytes], offset: int = 0, include: Callable[[str], bool] = lambda name: True) -> Iterator[Member]:
    """The members of an unpacked tar file from `offset` on; the data of those that are not included by name is empty.

    One member at a time is in memory. Raises one of READ_ERRORS for a damaged or truncated file.
    """
    if file.seekable():
        file.seek(offset)
        start, mode = 0, "r:"
    else:
        _skip(file, offset)
        # Positions in a stream count from where it was opened.
        start, mode = offset, "r|"
    with tarfile.open(fileobj=file, mode=mode, tarinfo=_Header) as tar:  # type: ignore[call-overload] # str is no Literal
        for header in tar:
            if header.isfile():
                data = cast(IO[bytes], tar.extractfile(header)).read() if include(header.name) else b""
                yield Member(header.name, start + header.offset, data)
            # `tarfile` keeps every header.
            tar.members = []


def foreign_samples(file: IO[bytes], offset: int = 0) -> Iterator[TarSample]:
    """The samples of an unpacked tar file that other tools wrote, from the one at `offset` on.

    Raises one of READ_ERRORS for a damaged or truncated file, and for one that has a member twice.
    """
    from webdataset.tariterators import base_plus_ext, group_by_keys

    def has_known_extension(name: str) -> bool:
        return (base_plus_ext(name)[1] or "").lower() in EXTENSIONS

    # The library gives a sample the `__url__` of its first member, so this carries the position.
    entries = (
        {"fname": member.name, "data": member.data, "__url__": member.offset}
        for member in members(file, offset, has_known_extension)
        if not METADATA.match(member.name)
    )
    try:
        for sample in group_by_keys(entries):
            fields = {extension: data for extension, data in sample.items() if extension in EXTENSIONS}
            yield TarSample(sample["__key__"], sample["__url__"], fields)
    except ValueError as error:
        name, separator, _ = str(error.args[0]).partition(": duplicate file name in tar file")
        raise tarfile.ReadError(f"{name} is in it twice" if separator else str(error)) from None


def decode_fields(fields: dict[str, bytes]) -> dict[str, Any]:
    """The values of a sample's fields by extension without `.gz`: a text, an int, an array, JSON; of jsonl the list of lines.

    MemberError names the extension of one that is not what it says. Pickled objects in an array are refused.
    """
    from webdataset.autodecode import decoders

    values: dict[str, Any] = {}
    for extension, data in fields.items():
        kind = extension.removesuffix(".gz")
        try:
            if kind != extension:
                data = gzip.decompress(data)
            if kind == "jsonl":
                values[kind] = [line for line in data.splitlines() if line.strip()]
            else:
                values[kind] = decoders["txt" if kind in TEXT_EXTENSIONS else kind](data)
        except UnicodeDecodeError as error:
            raise MemberError(extension, f"is not UTF-8 (byte {error.start + 1})") from None
        except json.JSONDecodeError as error:
            raise MemberError(extension, f"is not valid JSON: {error}") from None
        except (ValueError, RecursionError, OSError, EOFError, zlib.error) as error:
            raise MemberError(extension, f"cannot be decoded: {error}") from None
    return values


class MemberError(ValueError):
    """A member that cannot be decoded."""

    def __init__(self, extension: str, problem: str) -> None:
        super().__init__(f"its .{extension} {problem}")
        self.extension = extension


class _Header(tarfile.TarInfo):
    """A member's header. tarfile would treat a damaged or truncated header as the end of the file."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise  # so an archive ends
            raise tarfile.ReadError(f"a header in it is damaged, or its end is missing ({error})") from None


def _skip(file: IO[bytes], size: int) -> None:
    while size > 0 and (data := file.read(min(size, SKIPPED_BYTES))):
        size -= len(data)
