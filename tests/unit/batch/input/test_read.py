"""What read tasks give, and what they read for it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tandem.batch.input import read, sources, unit_rows
from tandem.batch.input.plan import Chunker, ChunkSize, Position, WorkUnit, units
from tandem.batch.input.sources import Row
from tandem.batch.models import BaseModel, ResolvedModel
from tandem.batch.output.write import Output
from tandem.batch.work import WorkerContext
from tandem.config import ServedModelConfig
from tandem.engine.spec import EngineSpec

ROWS = 20
LEFT = [0, 1, 4, 7]
"""Chunks of two rows that are unfinished."""


def write(path: Path) -> Path:
    lines = b"".join(json.dumps({"prompt": f"say {i}"}).encode() + b"\n" for i in range(ROWS))
    match path.suffix:
        case ".jsonl":
            path.write_bytes(lines)
        case ".gz":
            path.write_bytes(gzip.compress(lines))
        case ".parquet":
            pq.write_table(pa.table({"prompt": [f"say {i}" for i in range(ROWS)]}), path)
    return path


def left_of(file: Path) -> list[WorkUnit]:
    chunks = Chunker(ChunkSize(2)).chunks(0, [(row.position, len(row.raw), "echo") for row in sources.rows_of(file)])
    every = units(chunks, ["echo"])
    return [every[i] for i in LEFT]


@pytest.mark.parametrize(
    ("suffix", "opened"),
    # Where any byte can be gone to, that is done; where not, the file is read through once.
    [(".jsonl", [0, 8, 14]), (".jsonl.gz", [0]), (".parquet", [0])],
)
def test_a_task_goes_through_its_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, opened: list[int]
) -> None:
    file = write(tmp_path / f"rows{suffix}")
    todo, places = left_of(file), list[int]()

    def rows_of(file: Path, position: Position) -> Iterator[Row]:
        places.append(position.place)
        return sources.rows_of(file, position)

    monkeypatch.setattr(unit_rows, "rows_of", rows_of)
    monkeypatch.setattr(read.ray, "get", lambda reference: reference)
    echo = ResolvedModel(BaseModel(id="echo", name="echo", path=""))
    work = WorkerContext(
        spec=EngineSpec(kind="echo", id="echo", name="echo", path=""),
        served=ServedModelConfig(model="echo", engine="echo"), default=echo, targets={}, request={},
        output=Output.at(str(tmp_path / "out")), window_rows=4,
    )  # fmt: skip
    tables = [table.to_pylist() for table in read.read(file, todo, work)]
    assert places == opened
    assert [table[0]["unit"] for table in tables] == [unit.name for unit in todo]
    for chunk, ((table,)) in zip(LEFT, tables, strict=True):
        numbers = [2 * chunk, 2 * chunk + 1]
        assert table["row"] == numbers
        assert [json.loads(raw)["prompt"] for raw in table["raw"]] == [f"say {i}" for i in numbers]
        assert all(where.startswith(str(file)) for where in table["where"])
