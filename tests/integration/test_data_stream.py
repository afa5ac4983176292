"""Ray Data gives every rank its rows, in one order for any number of ranks, held in memory or streamed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tandem.cluster import LocalCluster
from tandem.config import DataConfig
from tandem.data.build import build_dataset
from tandem.data.index import DatasetIndex
from tandem.data.packing import pack
from tandem.data.stream import Stream, open_stream
from tandem.data.tokenize import TextEncoder
from tandem.errors import DataError

LENGTH = 32


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    (folder / "text.txt").write_text("".join(f"Paragraph {n} of some text about {n * n}.\n\n" for n in range(300)))
    build_dataset(str(folder / "text.txt"), folder / "data", vocab_size=300, shard_bytes=3000)
    return folder / "data"


def opened(dataset: Path, *, workers: int, held_bytes: int | None = None, length: int = LENGTH) -> Stream:
    index = DatasetIndex.load(dataset)
    encoder = TextEncoder(str(dataset / "tokenizer"))
    config = DataConfig(path=str(dataset), sequence_length=length)
    return open_stream(dataset, index, encoder, config, workers=workers, seed=3, held_bytes=held_bytes)


@pytest.fixture(scope="module")
def held(dataset: Path, ray_cluster: LocalCluster) -> Stream:
    return opened(dataset, workers=2)


@pytest.fixture(scope="module")
def streamed(dataset: Path, ray_cluster: LocalCluster) -> Stream:
    return opened(dataset, workers=2, held_bytes=0)


def test_an_epoch_of_held_rows_is_the_whole_dataset(dataset: Path, held: Stream):
    from tandem.data.shards import read_samples

    encoder = TextEncoder(str(dataset / "tokenizer"))
    expected = [
        pack(encoder.texts([s.text for s in read_samples([path])]), LENGTH, encoder.pad_id, split=True)
        for path in DatasetIndex.load(dataset).shard_paths(dataset)
    ]
    total = sum(held.counts)
    rows = held.rows(0, 1, None).take(total)
    key = lambda row: row.tobytes()  # noqa: E731
    assert sorted(map(key, rows)) == sorted(key(row) for part in expected for row in part)


@pytest.mark.parametrize("kind", ["held", "streamed"])
def test_ranks_share_one_order_and_a_cursor_finds_the_next_row(kind: str, request: pytest.FixtureRequest):
    stream: Stream = request.getfixturevalue(kind)
    both = np.empty((24, 3, LENGTH), np.int32)
    for rank in range(2):
        both[rank::2] = stream.rows(rank, 2, None).take(12)
    np.testing.assert_array_equal(stream.rows(1, 2, stream.cursor(14)).take(4), both[15:23:2])
    if kind == "held":
        np.testing.assert_array_equal(stream.rows(0, 1, None).take(24), both)


def test_a_cursor_of_other_data_is_refused(dataset: Path, held: Stream):
    with pytest.raises(DataError, match="other data"):
        held.rows(0, 2, {**held.cursor(4), "total": 5})


def test_too_little_data_for_the_workers_is_refused(dataset: Path, ray_cluster: LocalCluster):
    with pytest.raises(DataError, match="too few for the 5000 workers"):
        opened(dataset, workers=5000)
    with pytest.raises(DataError, match="each worker needs one"):
        opened(dataset, workers=5000, held_bytes=0)
