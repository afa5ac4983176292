"""What is held out is not trained on, and is the same each time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tandem.data.build import build_dataset
from tandem.data.heldout import evaluation_rows, hold_out, hold_out_of_each, rows_of_each
from tandem.data.index import DatasetIndex, Part, ShardInfo
from tandem.data.spec import PackSpec
from tandem.data.tokenize import TextEncoder
from tandem.errors import DataError


def index_of(shards: int) -> DatasetIndex:
    return DatasetIndex(
        kind="text", samples=3 * shards, digest="d", source="s", tokenizer_digest="t", created="c",
        shards=tuple(ShardInfo(name=f"{n:06d}.tar", samples=3, bytes=1, sha256="") for n in range(shards)),
    )  # fmt: skip


@pytest.mark.parametrize(("shards", "share", "held"), [(64, 0.05, 3), (64, 0.5, 32), (2, 0.01, 1), (3, 0.5, 2)])
def test_a_share_of_the_shards_is_held_out_and_the_rest_trained_on(shards: int, share: float, held: int):
    index = index_of(shards)
    rest, out = hold_out(index, share, Path("d"))
    assert len(out.shards) == held and out.samples == 3 * held
    assert sorted(s.name for s in (*rest.shards, *out.shards)) == [s.name for s in index.shards]
    assert hold_out(index, share, Path("d")) == (rest, out)


def test_held_out_shards_are_spread_over_the_dataset():
    _, out = hold_out(index_of(100), 0.04, Path("d"))
    assert [s.name for s in out.shards] == ["000012.tar", "000037.tar", "000062.tar", "000087.tar"]


def test_a_single_shard_cannot_be_shared():
    with pytest.raises(DataError, match="1 shard, so none can be held out.*evaluation.data"):
        hold_out(index_of(1), 0.1, Path("d"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heldout")
    lines = [{"prompt": f"What is {n}?", "answer": f"It is {n * n}."} for n in range(120)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    build_dataset(str(folder / "pairs.jsonl"), folder / "data", vocab_size=300)
    return folder / "data"


def spec(dataset: Path, length: int) -> PackSpec:
    return PackSpec(encoder=TextEncoder(str(dataset / "tokenizer")), kind="pairs", length=length, loss_on_all=False)


def test_rows_to_evaluate_on_are_the_same_each_time_and_as_many_as_asked_for(dataset: Path):
    index = DatasetIndex.load(dataset)
    rows = evaluation_rows(dataset, index, spec(dataset, 48), 5)
    assert rows.shape == (5, 3, 48)
    np.testing.assert_array_equal(rows, evaluation_rows(dataset, index, spec(dataset, 48), 5))
    assert len(np.unique(rows, axis=0)) == 5
    everything = evaluation_rows(dataset, index, spec(dataset, 48), 10_000)
    assert 5 < len(everything) < 120


def test_rows_without_an_answer_are_refused(dataset: Path):
    with pytest.raises(DataError, match="hold no row with loss within 8 tokens"):
        evaluation_rows(dataset, DatasetIndex.load(dataset), spec(dataset, 8), 5)


def test_a_damaged_shard_is_named(dataset: Path, tmp_path: Path):
    index = DatasetIndex.load(dataset)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / index.shards[0].name).write_bytes(b"not a tar")
    with pytest.raises(DataError, match="000000.tar cannot be read"):
        evaluation_rows(tmp_path, index, spec(dataset, 48), 5)


def test_of_a_mixture_a_share_of_every_dataset_is_held_out_and_evaluated_on_by_weight(dataset: Path):
    index = DatasetIndex.load(dataset)
    parts = tuple(Part(folder=dataset, location=dataset, index=index, weight=weight) for weight in (3.0, 1.0))
    trained, held = hold_out_of_each(parts, 0.4)
    assert [part.weight for part in trained] == [part.weight for part in held] == [3.0, 1.0]
    for kept, out in zip(trained, held, strict=True):
        names = [shard.name for shard in (*kept.index.shards, *out.index.shards)]
        assert sorted(names) == [shard.name for shard in index.shards]
    rows = rows_of_each(held, spec(dataset, 48), 8)
    assert len(rows) == 8
    first = evaluation_rows(dataset, held[0].index, spec(dataset, 48), 6)
    np.testing.assert_array_equal(rows[:6], first)
