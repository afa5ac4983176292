"""Rows out of files, from any row on."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tandem.batch.input.plan import Position
from tandem.batch.input.sources import find_files, rows_of
from tandem.data.build import build_dataset
from tandem.errors import DataError

COUNT = 11


def write_shard(path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for i in range(COUNT):
            # A long name takes a header of its own before the member's.
            key = f"{'deep/' * 30}{i}" if i == 4 else f"k{i}"
            for extension, data in (("json", b'{"max_tokens": %d}' % i), ("cls", b"0"), ("txt", f"say {i}".encode())):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write(folder: Path, suffix: str) -> Path:
    """A file of COUNT rows."""
    path, texts = folder / f"rows{suffix}", [json.dumps({"prompt": f"say {i}"}) for i in range(COUNT)]
    lines = ("\n\n".join(texts[:5]) + "\n \n" + "\n".join(texts[5:])).encode()
    match suffix:
        case ".jsonl":
            path.write_bytes(lines)
        case ".jsonl.gz":
            path.write_bytes(gzip.compress(lines))
        case ".parquet":
            models = [None if i % 2 else "red" for i in range(COUNT)]
            table = pa.table({"prompt": [f"say {i}" for i in range(COUNT)], "model": models})
            pq.write_table(table, path, row_group_size=4)
        case ".tar":
            write_shard(path)
        case ".tar.gz":
            write_shard(path, "w:gz")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet", ".tar", ".tar.gz"])
def test_a_file_can_be_read_from_any_row_on(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path, suffix)
    rows = list(rows_of(file))
    assert [json.loads(row.raw)["prompt"] for row in rows] == [f"say {i}" for i in range(COUNT)]
    assert len({row.where for row in rows}) == COUNT
    for i, row in enumerate(rows):
        assert list(rows_of(file, row.position)) == rows[i:]


def test_a_column_that_a_row_does_not_use_is_not_in_it(tmp_path: Path) -> None:
    rows = [json.loads(row.raw) for row in rows_of(write(tmp_path, ".parquet"))]
    assert rows[0] == {"prompt": "say 0", "model": "red"} and rows[1] == {"prompt": "say 1"}


def test_a_sample_is_known_by_its_key_and_lines_by_their_numbers(tmp_path: Path) -> None:
    samples = list(rows_of(write(tmp_path, ".tar")))
    assert json.loads(samples[3].raw) == {"custom_id": "k3", "max_tokens": 3, "prompt": "say 3"}
    assert samples[3].where == "sample k3"
    assert [row.where for row in rows_of(write(tmp_path, ".jsonl"))][:3] == ["line 1", "line 3", "line 5"]


def test_a_row_that_cannot_be_read_is_a_row_with_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (
            ("a.json", b"{bad"),
            ("b.txt", b"\xff"),
            ("c.cls", b"1"),
            ("d.json", b"[1]"),
            ("e.txt", b"fine"),
            ("f.json", b"[" * 100_000),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    problems = [row.problem for row in rows_of(path)]
    assert [problem and " ".join(problem.split()[:4]) for problem in problems] == [
        "Its .json is not", "Its .txt is not", "The sample has nothing", "It is a list;", None, "Its .json cannot be",
    ]  # fmt: skip
    assert problems[0] is not None and "valid JSON" in problems[0] and problems[0].endswith(".")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    for name in ("x.parquet", "x.tar", "x.jsonl.gz"):
        (tmp_path / name).write_bytes(b"neither of these" * 100)
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            list(rows_of(tmp_path / name))


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("damage", ["header", "cut in a header", "cut between members", "cut in a member"])
def test_a_tar_that_is_damaged_past_its_start_is_no_shorter_one(tmp_path: Path, suffix: str, damage: str) -> None:
    data = bytearray(write_shard(tmp_path / "whole.tar").read_bytes())
    with tarfile.open(tmp_path / "whole.tar") as tar:
        member = tar.getmembers()[20]
    match damage:
        case "header":
            data[member.offset + 150] ^= 0xFF
        case "cut in a header":
            del data[member.offset + 100 :]
        case "cut between members":
            del data[member.offset :]
        case "cut in a member":
            del data[member.offset + 513 :]
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(data) if suffix == ".tar.gz" else data)
    position = next(row.position for row in rows_of(tmp_path / "whole.tar") if row.position.place == 2)
    for start in (Position(), position):
        with pytest.raises(DataError, match="cannot be read"):
            list(rows_of(path, start))


def test_files_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.parquet", "c.tar", "notes.md"):
        (tmp_path / name).write_text("")
    assert [Path(str(file)).name for file in find_files(str(tmp_path))] == ["a.parquet", "b.jsonl", "c.tar"]
    assert [Path(str(file)).name for file in find_files(str(tmp_path / "[bc].*"))] == ["b.jsonl", "c.tar"]
    assert [Path(str(file)).name for file in find_files(str(tmp_path / "b.jsonl"))] == ["b.jsonl"]


def test_a_dataset_of_ours_is_the_shards_in_it(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "What?", "answer": "That."}\n' * 3)
    build_dataset(str(tmp_path / "pairs.jsonl"), tmp_path / "pairs", vocab_size=280)
    files = find_files(str(tmp_path / "pairs"))
    assert [json.loads(row.raw)["prompt"] for file in files for row in rows_of(file)] == ["What?"] * 3


def test_an_input_that_is_not_there_is_refused_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text("")
    with pytest.raises(DataError, match=r"No input at .*question.jsonl. Did you mean 'questions.jsonl'"):
        find_files(str(tmp_path / "question.jsonl"))
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(DataError, match=r"notes.md is of a sort that is not read here. Known are .jsonl"):
        find_files(str(tmp_path / "notes.md"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file of rows"):
        find_files(str(tmp_path / "empty"))
