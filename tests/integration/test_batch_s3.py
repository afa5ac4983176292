"""A batch run's files in an object store: a real S3 server (moto), spoken to by s3fs as any other would be."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from commands import tandem
from s3fs.core import S3File

from tandem.batch.files import writing
from tandem.batch.input.plan import Position
from tandem.batch.input.sources import rows_of
from tandem.batch.output.write import Output
from tandem.batch.prepare import prepare
from tandem.batch.run import answer
from tandem.config import BatchConfig
from tandem.errors import ConfigError, DataError, StorageError
from tandem.storage import file_system


@pytest.fixture(scope="module")
def bucket(s3: None) -> str:
    file_system("s3://batches").mkdir("batches")
    return "s3://batches"


def test_input_pieces_and_output_may_all_lie_in_a_store(bucket: str, tandem_home: Path) -> None:
    store = file_system(bucket)
    for name, rows in (("b", ["{bad", '{"prompt": "x", "model": "nobody"}']), ("a", ["[1]"])):
        store.pipe_file(f"{bucket}/in/{name}.jsonl", "\n".join(rows).encode())
    config = BatchConfig(
        input=f"{bucket}/in/*.jsonl", model="echo", engine="echo", output=f"{bucket}/out", rows_per_piece=1
    )
    run = prepare(config)
    assert [str(file) for file in run.survey.files] == [f"{bucket}/in/a.jsonl", f"{bucket}/in/b.jsonl"]
    assert [(chunk.source, chunk.first, chunk.position.offset) for chunk in run.survey.chunks] == [
        (0, 0, 0),
        (1, 1, 0),
        (1, 2, 5),
    ]
    summary = answer(run)
    assert (summary.answered, summary.failed, summary.errors) == (0, 3, f"{bucket}/out/errors.jsonl")
    lines = store.cat_file(f"{bucket}/out/errors.jsonl").decode().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [0, 1, 2]
    assert json.loads(lines[2])["where"] == f"{bucket}/in/b.jsonl line 2"
    assert answer(prepare(config)).found == 3
    # An object that was written again is another input, whatever its length.
    store.pipe_file(f"{bucket}/in/a.jsonl", b"[2]")
    with pytest.raises(ConfigError, match="a.jsonl changed"):
        prepare(config)
    with pytest.raises(DataError, match="No input at s3://batches/nothing.jsonl"):
        prepare(BatchConfig(input=f"{bucket}/nothing.jsonl", model="echo", engine="echo", output=f"{bucket}/out2"))


def test_a_piece_in_a_store_is_there_once_it_is_whole(bucket: str) -> None:
    output = Output.at(f"{bucket}/pieces")
    assert output.manifest() is None and output.published() == set()
    output.publish("00000000-0.jsonl", [b'{"row":0,"error":null}'])
    output.publish("00000000-0.jsonl", [b'{"row":0,"error":null}'])
    assert output.published() == {"00000000-0.jsonl"}
    assert output.is_published("00000000-0.jsonl") and not output.is_published("00000001-0.jsonl")
    output.record_crash("the engine died")
    assert output.crashes() == ["the engine died"]
    output.clear_crashes()
    assert output.crashes() == []


def test_of_a_large_object_is_fetched_what_is_read_of_it(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps({"prompt": "word " * 100}).encode() + b"\n"
    file_system(bucket).pipe_file(f"{bucket}/large.jsonl", line * 20_000)
    fetched, asked = list[int](), list[int]()
    fetch, ask = S3File._fetch_range, S3File.read

    def counted_fetch(self: Any, start: int, end: int) -> bytes:
        fetched.append(end - start)
        return bytes(fetch(self, start, end))

    def counted_ask(self: Any, length: int = -1) -> bytes:
        data = bytes(ask(self, length))
        asked.append(len(data))
        return data

    monkeypatch.setattr(S3File, "_fetch_range", counted_fetch)
    monkeypatch.setattr(S3File, "read", counted_ask)
    row = next(rows_of(f"{bucket}/large.jsonl", Position(5000 * len(line), 5000)))
    assert (row.raw, row.where) == (line.strip(), "line 5001")
    assert sum(fetched) <= 3 << 20
    asked.clear()
    assert sum(1 for _ in rows_of(f"{bucket}/large.jsonl")) == 20_000
    # Each byte once, and not a block for each line.
    assert sum(asked) == 20_000 * len(line)


def test_a_file_that_was_not_written_to_its_end_is_not_there(bucket: str) -> None:
    store, place = file_system(bucket), f"{bucket}/half.jsonl"
    for lines in (1, 200_000):
        with (
            pytest.raises(StorageError, match="half.jsonl cannot be written: OSError: a piece is gone"),
            writing(place) as file,
        ):
            file.write(b"x" * 300 * lines)
            raise OSError("a piece is gone")
        assert not store.exists(place)
        with writing(place) as file:
            file.write(b"x" * 300 * lines)
        assert store.size(place) == 300 * lines
        store.rm_file(place)
    with writing(place):
        pass
    assert store.size(place) == 0


@pytest.mark.slow  # a batch run on a cluster of its own
def test_workers_read_from_a_store_and_publish_to_it(bucket: str, tmp_path: Path) -> None:
    store = file_system(bucket)
    rows = [json.dumps({"prompt": f"row {i}"}) for i in range(20)]
    rows[7] = "{bad"
    store.pipe_file(f"{bucket}/work/a.jsonl", "\n".join(rows[:9]).encode())
    store.pipe_file(f"{bucket}/work/b.jsonl.gz", gzip.compress("\n".join(rows[9:]).encode()))
    (tmp_path / "home").mkdir()
    # A cluster of its own: the session's may have started before the store did.
    done = tandem(
        "batch", "run", "--input", f"{bucket}/work", "--model", "parrot", "--output", f"{bucket}/work/answers.jsonl",
        "--set", "engine=echo", "--set", "rows_per_piece=4", "--set", "cpus_per_replica=0.5",
        home=tmp_path / "home", timeout_s=100,
    )  # fmt: skip
    # 3: done, but for rows that have no answer.
    assert done.returncode == 3, done.stdout
    assert "19 of 20 rows answered" in done.stdout
    results = [json.loads(line) for line in store.cat_file(f"{bucket}/work/answers.jsonl").splitlines()]
    assert [(line["row"], line["text"]) for line in results] == [(i, f"row {i}") for i in range(20) if i != 7]
    errors = [json.loads(line) for line in store.cat_file(f"{bucket}/work/answers.errors.jsonl").splitlines()]
    assert [line["where"] for line in errors] == [f"{bucket}/work/a.jsonl line 8"]
    assert [name.rpartition("/")[2] for name in store.find(f"{bucket}/work/answers.run")] == ["manifest.json"]
