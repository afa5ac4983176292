"""Ray Data gives every rank its rows, in one order for any number of ranks, whether blocks stay in memory or are read again."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.cluster.local import LocalCluster
from tandem.config import DataConfig
from tandem.data.build import build_dataset
from tandem.data.index import DatasetIndex, Part
from tandem.data.order import Sampler
from tandem.data.spec import Source
from tandem.data.stream import Stream, open_stream
from tandem.data.tokenize import TextEncoder
from tandem.errors import DataError

LENGTH = 32
ALL = 2**40
"""Bytes to keep: everything stays."""


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two of several shards, with one tokenizer."""
    folder = tmp_path_factory.mktemp("stream")
    for name, paragraphs, shard_bytes in (("text", 300, 1300), ("more", 60, 600)):
        (folder / f"{name}.txt").write_text(
            "".join(f"Paragraph {n} of some {name} about {n * n}.\n\n" for n in range(paragraphs))
        )
        tokenizer = folder / "text" / "tokenizer" if name == "more" else None
        build_dataset(
            str(folder / f"{name}.txt"), folder / name, vocab_size=300, shard_bytes=shard_bytes, tokenizer=tokenizer
        )
    return folder / "text", folder / "more"


def opened(
    *datasets: Path, workers: int = 2, held_bytes: int | None = None, length: int = LENGTH, **settings: Any
) -> Stream:
    parts = tuple(
        Part(folder=folder, location=folder, index=DatasetIndex.load(folder), weight=float(3 - number))
        for number, folder in enumerate(datasets)
    )
    config = DataConfig(path="x", sequence_length=length, open_shards=3, **settings)
    encoder = TextEncoder(str(datasets[0] / "tokenizer"))
    return open_stream(parts, encoder, config, workers=workers, seed=3, held_bytes=held_bytes)


@pytest.fixture(scope="module", params=["held", "streamed"])
def stream(request: pytest.FixtureRequest, datasets: tuple[Path, Path], ray_cluster: LocalCluster) -> Iterator[Stream]:
    """A mixture of both datasets."""
    import ray

    opened_stream = opened(*datasets, held_bytes=ALL if request.param == "held" else 0, read_ahead=2)
    yield opened_stream
    ray.kill(opened_stream.reader)


def packed(stream: Stream) -> list[list[Any]]:
    """The rows of each shard of each dataset, packed here."""
    return [[source.rows(shard) for shard in range(len(source.paths))] for source in stream.sources]


def expected(stream: Stream, count: int) -> Any:
    """The first rows of the order, without Ray."""
    rows = packed(stream)
    sampler = Sampler(stream.order, lambda position: len(rows[position.dataset][stream.order.shard(position)]))
    return np.stack([rows[r.dataset][r.shard][r.row] for r in sampler.share(0, 1, count)])


def epoch(stream: Stream) -> int:
    return sum(len(rows) for dataset in packed(stream) for rows in dataset)


def test_rows_come_in_the_order_over_epochs_for_any_number_of_ranks_that_change_at_a_cursor(stream: Stream):
    # 12 rows a batch, two epochs and a half; ranks change where one run ends and the next begins.
    batches = 5 * epoch(stream) // 2 // 12
    found = np.empty((batches * 12, 3, LENGTH), np.int32)
    cursor: dict[str, Any] | None = None
    done = 0
    for world, until in ((2, batches // 3), (3, batches // 2), (1, batches)):
        ranks = [stream.rows(rank, world, cursor) for rank in range(world)]
        for batch in range(done, until):
            rows = found[batch * 12 : batch * 12 + 12]
            for rank, source in enumerate(ranks):
                rows[rank::world] = source.take(12 // world)
        cursors = [json.dumps(source.cursor()) for source in ranks]
        assert len(set(cursors)) == 1
        cursor, done = json.loads(cursors[0]), until
        for source in ranks:
            # What was made ready beyond the cursor is forgotten.
            source.close()
    np.testing.assert_array_equal(found, expected(stream, len(found)))


def test_an_older_cursor_gives_the_same_rows_again(stream: Stream):
    with closing(stream.rows(0, 1, None)) as source:
        source.take(10)
        cursor = source.cursor()
        after = source.take(30)
        source.take(5 * epoch(stream))
    with closing(stream.rows(0, 1, cursor)) as source:
        np.testing.assert_array_equal(source.take(30), after)
        assert stream.name(source.positions[0]).endswith("(epoch 1)")


def test_a_batch_of_another_size_goes_on_where_the_last_one_ended(stream: Stream):
    with closing(stream.rows(0, 1, None)) as source:
        parts = [source.take(count) for count in (4, 4, 7, 1, 4)]
    np.testing.assert_array_equal(np.concatenate(parts), expected(stream, 20))


def test_processes_with_the_same_data_rank_see_the_same_rows_and_nothing_is_packed_twice(stream: Stream):
    peers = [stream.rows(0, 1, None, process=(number, 2)) for number in range(2)]
    for _ in range(6):
        first, second = (peer.take(6) for peer in peers)
        np.testing.assert_array_equal(first, second)
    for peer in peers:
        peer.close()


def kill(reader: Any) -> None:
    """SIGKILL to the reader's process."""
    import ray
    from ray.util.state import list_actors

    actors = list_actors(address=ray.get_runtime_context().gcs_address)
    (found,) = (actor for actor in actors if actor.actor_id == reader._actor_id.hex())
    os.kill(found.pid, signal.SIGKILL)


def test_the_feed_can_die_and_rows_go_on(stream: Stream):
    with closing(stream.rows(0, 1, None)) as source:
        rows = [source.take(8) for _ in range(2)]
        kill(stream.reader)
        rows += [source.take(8) for _ in range(20)]
    np.testing.assert_array_equal(np.concatenate(rows), expected(stream, 8 * 22))


class DyingFeed:
    """Asks a reader, which dies before those who asked fetch the first blocks that they are given."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self.blocks = self
        self.lost: list[bool] = []

    def remote(self, positions: Any, taker: int, takers: int, lost: bool) -> Any:
        import ray

        @ray.remote
        def gone() -> None:
            raise ray.exceptions.ObjectLostError("0" * 56, "", "")

        self.lost.append(lost)
        answer = ray.get(self.reader.blocks.remote(positions, taker, takers, lost))
        if len(self.lost) == 1:
            kill(self.reader)
            # On one machine what a dead owner has packed can be had for a while, by chance: here it is lost.
            answer = [[gone.remote()] for _ in answer]
        return ray.put(answer)


def test_blocks_that_are_lost_on_their_way_are_packed_again(stream: Stream):
    reader = DyingFeed(stream.reader)
    with closing(replace(stream, reader=reader).rows(0, 1, None)) as source:
        np.testing.assert_array_equal(source.take(40), expected(stream, 40))
    assert reader.lost[:2] == [False, True] and not any(reader.lost[2:])


def test_rows_of_another_shard_than_was_asked_for_are_not_taken(stream: Stream):
    # As if blocks had been handed over in another order.
    turned = replace(stream, sources=tuple(replace(s, paths=s.paths[::-1]) for s in stream.sources))
    with (
        closing(turned.rows(0, 1, None)) as source,
        pytest.raises(RuntimeError, match="returned the rows of .*tar for"),
    ):
        source.take(50)


def test_rows_that_are_skipped_do_not_come_and_leave_the_rest_as_it_is(stream: Stream):
    ranks = [stream.rows(rank, 2, None) for rank in range(2)]
    rows = expected(stream, 8 + epoch(stream) + 12)
    for source in ranks:
        source.take(4)
        source.skip(epoch(stream))
    assert ranks[0].cursor() == ranks[1].cursor() and ranks[0].cursor()["walk"]["rows"] == 8 + epoch(stream)
    for rank, source in enumerate(ranks):
        with closing(source):
            np.testing.assert_array_equal(source.take(6), rows[-12:][rank::2])


def test_held_and_streamed_rows_have_one_identity_and_one_order(datasets: tuple[Path, Path], ray_cluster: LocalCluster):
    held, streamed = opened(*datasets, held_bytes=ALL), opened(*datasets, held_bytes=0)
    with closing(held.rows(0, 1, None)) as first:
        first.take(20)
        cursor = first.cursor()
        following = first.take(20)
    with closing(streamed.rows(0, 1, cursor)) as second:
        np.testing.assert_array_equal(second.take(20), following)


@pytest.mark.parametrize("change", ["seed", "length", "data", "weights", "old"])
def test_a_cursor_of_other_data_is_refused(datasets: tuple[Path, Path], ray_cluster: LocalCluster, change: str):
    stream = opened(datasets[0])
    cursor = stream.rows(0, 2, None).cursor()
    other = stream
    match change:
        case "seed":
            part = (Part(folder=datasets[0], location=datasets[0], index=DatasetIndex.load(datasets[0]), weight=3.0),)
            encoder = TextEncoder(str(datasets[0] / "tokenizer"))
            other = open_stream(part, encoder, stream.config, workers=1, seed=4)
        case "length":
            other = opened(datasets[0], length=16)
        case "data":
            other = opened(datasets[1])
        case "weights":
            other = opened(*datasets)
        case "old":
            cursor = {"rows": 4, "total": 5, "lanes": 0, "seed": 3}
    with pytest.raises(DataError, match="other data"):
        other.rows(0, 2, cursor)


def test_too_little_data_for_the_workers_is_refused(datasets: tuple[Path, Path], ray_cluster: LocalCluster):
    with pytest.raises(DataError, match="too few for the 5000 workers"):
        opened(datasets[0], workers=5000)


@pytest.fixture
def damaged(datasets: tuple[Path, Path], tmp_path: Path) -> Path:
    """A dataset with two shards of which a byte has changed."""
    folder = tmp_path / "damaged"
    shutil.copytree(datasets[1], folder)
    for name in ("000001.tar", "000002.tar"):
        shard = folder / "shards" / name
        data = bytearray(shard.read_bytes())
        data[600] ^= 1
        shard.write_bytes(data)
    return folder


def test_damaged_shards_are_left_out_and_named_up_to_the_limit(damaged: Path, ray_cluster: LocalCluster):
    stream = opened(damaged, skip_damaged=2)
    told: list[str] = []
    with closing(stream.rows(0, 1, None, notify=told.append)) as source:
        rows = source.take(200)
        assert {position.shard for position in source.positions} == set(range(len(stream.sources[0].paths))) - {1, 2}
    assert len(rows) == 200 and len(told) == 2
    assert "number 1 of at most 2" in told[0] and "is damaged" in told[0]
    assert {"000001.tar", "000002.tar"} == {name for name in ("000001.tar", "000002.tar") for t in told if name in t}
    fewer = replace(stream, config=replace(stream.config, skip_damaged=1))
    with closing(fewer.rows(0, 1, None)) as source, pytest.raises(DataError, match=r"skip_damaged \(1\)"):
        source.take(200)
        source.take(200)


def test_no_shard_is_read_by_the_process_that_takes_rows(
    datasets: tuple[Path, Path], ray_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
):
    stream = opened(*datasets)
    for method in ("rows",):
        monkeypatch.setattr(Source, method, lambda *_: pytest.fail("read here"))
    with closing(stream.rows(0, 1, None)) as source:
        assert len(source.take(30)) == 30
