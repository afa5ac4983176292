"""Shards of other tools: each kind of member, compressed or not, and damage that is named."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tandem.batch.input.sources import rows_of
from tandem.data.sources.corpus import open_corpus
from tandem.data.sources.records import webdataset
from tandem.data.sources.samples import Text
from tandem.data.tar import Member, foreign_samples, members
from tandem.errors import DataError


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def tar(*entries: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(data)
    return sink.getvalue().to_pybytes()


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".tar": bytes,
    ".tar.gz": gzip.compress,
    ".tgz": gzip.compress,
    ".tar.zst": zstd,
}
ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)
LINES = b'{"text": "one"}\n\n{"text": "two"}\n'
MEMBERS = {
    "json": (b'{"text": "from json"}', ["from json"]),
    "jsonl": (LINES, ["one", "two"]),
    "txt": ("from naïve text".encode(), ["from naïve text"]),
    "json.gz": (gzip.compress(b'{"text": "from json"}'), ["from json"]),
    "jsonl.gz": (gzip.compress(LINES), ["one", "two"]),
    "txt.gz": (gzip.compress(b"from text"), ["from text"]),
    "JSON": (b'{"text": "from json"}', ["from json"]),
}


@pytest.mark.parametrize("extension", MEMBERS)
@pytest.mark.parametrize("suffix", PACK)
def test_texts_of_each_kind_are_read_from_packed_and_plain_shards(tmp_path: Path, suffix: str, extension: str) -> None:
    data, texts = MEMBERS[extension]
    shard = tmp_path / f"shard{suffix}"
    others = [(f"a.{name}", b"\x89PNG" * 1000) for name in ("jpg", "seg.png")]
    shard.write_bytes(
        PACK[suffix](tar(("__meta__/x.json", b"{"), *others, (f"a.{extension}", data), ("b.txt", b"end")))
    )
    assert list(open_corpus(str(shard)).samples()) == [Text(text) for text in [*texts, "end"]]


@pytest.mark.parametrize("packed", [False, True])
def test_labels_and_arrays_are_fields_of_the_record(tmp_path: Path, packed: bool) -> None:
    end, pack = (".gz", gzip.compress) if packed else ("", bytes)
    shard = tmp_path / "shard.tar"
    shard.write_bytes(
        tar(*((f"d/a.{n}{end}", pack(data)) for n, data in (("cls", b"7\n"), ("npy", npy(ARRAY)), ("txt", b"x"))))
    )
    ((where, record),) = webdataset(shard)
    assert where == f"{shard} sample d/a"
    assert (record["cls"], record["text"]) == (7, "x") and np.array_equal(record["npy"], ARRAY)
    shard.write_bytes(tar(("a.cls", b"7")))
    with pytest.raises(DataError, match=r"shard.tar sample a has the keys cls; it needs \"text\""):
        list(open_corpus(str(shard)).samples())


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.json", b"{bad", "its .json is not valid JSON"),
        ("a.txt", b"\xff", r"its .txt is not UTF-8 \(byte 1\)"),
        ("a.cls", b"cat", "its .cls cannot be decoded: invalid literal"),
        ("a.npy", npy(ARRAY)[:-1], "its .npy cannot be decoded"),
        ("a.npy", npy(np.array([{}], dtype=object)), "its .npy cannot be decoded: Object arrays"),
        ("a.json.gz", b"{}", "its .json.gz cannot be decoded: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"text" * 100, mtime=0)[:-9], "its .txt.gz cannot be decoded"),
        ("a.json", b"[1]", "is a list; it must be a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n{bad', "line 2 is not valid JSON"),
    ],
)
def test_a_member_that_cannot_be_used_is_named(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    shard = tmp_path / "shard.tar"
    shard.write_bytes(tar((name, data)))
    with pytest.raises(DataError, match=f"shard.tar sample a .*{said}"):
        list(webdataset(shard))


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("damage", ["header", "cut in a header", "cut between members", "cut in a member"])
def test_a_damaged_shard_is_named_and_is_no_shorter_one(tmp_path: Path, suffix: str, damage: str) -> None:
    data = bytearray(tar(*((f"{n}.txt", b"text" * 200) for n in range(9))))
    start = [member.offset for member in members(io.BytesIO(data))][5]
    match damage:
        case "header":
            data[start + 150] ^= 0xFF
        case "cut in a header":
            del data[start + 100 :]
        case "cut between members":
            del data[start:]
        case "cut in a member":
            del data[start + 600 :]
    shard = tmp_path / f"shard{suffix}"
    shard.write_bytes(PACK[suffix](bytes(data)))
    with pytest.raises(DataError, match=rf"shard{suffix} cannot be read as a tar file: .*\. Copy or download it again"):
        list(webdataset(shard))


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.zst"])
def test_a_truncated_compressed_shard_is_named(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).bytes(200_000).hex().encode()
    data = PACK[suffix](tar(("a.txt", noise), ("b.txt", noise)))
    shard = tmp_path / f"shard{suffix}"
    shard.write_bytes(data[: len(data) // 2])
    for read in (webdataset, rows_of):
        with pytest.raises(DataError, match=f"shard{suffix} cannot be read"):
            list(read(shard))


def test_a_member_that_is_there_twice_is_named(tmp_path: Path) -> None:
    shard = tmp_path / "shard.tar"
    shard.write_bytes(tar(("a.txt", b"1"), ("a.txt", b"2")))
    with pytest.raises(DataError, match="shard.tar cannot be read as a tar file: a.txt is in it twice"):
        list(webdataset(shard))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_packed_shard_is_known_by_its_bytes_whatever_its_name(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    shard = tmp_path / "shard.tar"
    shard.write_bytes(pack(tar(("a.txt", b"x"))))
    assert [record for _, record in webdataset(shard)] == [{"text": "x"}]


@pytest.mark.parametrize("suffix", PACK)
def test_a_batch_goes_on_at_any_row_of_a_shard_with_json_lines(tmp_path: Path, suffix: str) -> None:
    entries: list[tuple[str, bytes]] = []
    for n in range(4):
        lines = "".join(json.dumps({"prompt": f"{n} {line}"}) + "\n" for line in range(n))
        entries += [
            (f"s{n}.jsonl", lines.encode()),
            (f"s{n}.cls", b"1"),
            (f"s{n}.npy", npy(ARRAY)),
            (f"s{n}.txt", b"end"),
        ]
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(PACK[suffix](tar(*entries)))
    rows = list(rows_of(file))
    expected = [f"{n} {line}" if line < n else "end" for n in range(4) for line in range(n + 1)]
    assert [json.loads(row.raw)["prompt"] for row in rows] == expected
    assert [row.position.place for row in rows] == list(range(len(expected)))
    for i, row in enumerate(rows):
        assert list(rows_of(file, row.position)) == rows[i:]


def test_only_members_that_are_wanted_are_read_and_positions_are_those_to_start_at() -> None:
    data = tar(("a.jpg", b"image" * 1000), ("a.json", b"{}"), ("b.json", b"{}"))
    assert [m.data for m in members(io.BytesIO(data), include=lambda name: name.endswith("json"))] == [
        b"",
        b"{}",
        b"{}",
    ]
    _, second = foreign_samples(io.BytesIO(data))
    assert list(members(io.BytesIO(data), second.offset)) == [Member("b.json", second.offset, b"{}")]
