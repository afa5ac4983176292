"""What a reading task makes of a shard, without Ray."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tandem.data import spec
from tandem.data.build import build_dataset
from tandem.data.index import DatasetIndex, Kind, Part
from tandem.data.packing import pack, pack_preferences
from tandem.data.shards import read_samples
from tandem.data.spec import PackedBlock, Source, pack_shards, rows_of
from tandem.data.tokenize import TextEncoder
from tandem.errors import DataError

LENGTH = 64
LINES = {
    "text": {"text": "some words to learn from"},
    "pairs": {"prompt": "Which words are there to learn from?", "answer": "learn"},
    "preferences": {"prompt": "Which words are there to learn from?", "chosen": "learn", "rejected": "from"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spec")


def source(folder: Path, kind: Kind, length: int = LENGTH) -> Source:
    if not (folder / kind).exists():
        lines = [{key: f"{value} {n}" for key, value in LINES[kind].items()} for n in range(40)]
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        build_dataset(str(folder / f"{kind}.jsonl"), folder / kind, vocab_size=280, shard_bytes=300)
    part = Part(folder=folder / kind, location=folder / kind, index=DatasetIndex.load(folder / kind))
    return Source.of(part, TextEncoder(str(folder / kind / "tokenizer")), length=length, loss_on_all=False)


def packed(*sources: Source, plan: list[tuple[int, int]]) -> list[PackedBlock]:
    """What a task makes of each shard of a plan."""
    return [rows_of(table) for table in pack_shards([sources[dataset].only(shard) for dataset, shard in plan])]


def test_a_shard_becomes_its_rows_and_nothing_of_another(folder: Path):
    texts, liked = source(folder, "text"), source(folder, "preferences")
    encoder = texts.spec.encoder
    found = packed(texts, liked, plan=[(0, 2), (1, 0), (0, 1)])
    assert [block.shard for block in found] == [texts.paths[2], liked.paths[0], texts.paths[1]]
    (first, second, third) = (block.rows for block in found)
    for rows, shard in ((first, 2), (third, 1)):
        samples = read_samples([Path(texts.paths[shard])])
        expected = pack(encoder.texts([s.text for s in samples]), LENGTH, encoder.pad_id, split=True)  # type: ignore[union-attr]
        np.testing.assert_array_equal(rows, expected)
    found = [
        ([{"role": "user", "content": s.prompt}], s.chosen, s.rejected)  # type: ignore[union-attr]
        for s in read_samples([Path(liked.paths[0])])
    ]
    encoder = liked.spec.encoder
    np.testing.assert_array_equal(second, pack_preferences(encoder.preferences(found), LENGTH, encoder.pad_id))
    assert second.shape[1:] == (6, LENGTH) and len(second)


@pytest.mark.parametrize(("kind", "width"), [("pairs", 3), ("preferences", 6)])
def test_a_shard_without_usable_rows_gives_none_of_the_right_shape(folder: Path, kind: Kind, width: int):
    ((rows, _, error),) = packed(source(folder, kind, length=8), plan=[(0, 0)])
    assert rows.shape == (0, width, 8) and not error


def test_a_shard_whose_bytes_changed_is_named_and_does_not_stop_the_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(spec, "READ_AGAIN_S", (0.0,))
    texts = source(folder, "text")
    copy = tmp_path / "000001.tar"
    data = bytearray(Path(texts.paths[1]).read_bytes())
    data[700] ^= 1
    copy.write_bytes(data)
    paths = (texts.paths[0], str(copy), str(tmp_path / "missing.tar"))
    changed = Source(spec=texts.spec, paths=paths, bytes=texts.bytes[:3], digests=texts.digests[:3])
    (whole, _, none), (left, _, damaged), (_, _, missing) = packed(changed, plan=[(0, 0), (0, 1), (0, 2)])
    assert len(whole) and not none and left.shape == (0, 3, LENGTH)
    assert f"{copy} is damaged: its bytes are not those" in damaged
    assert "missing.tar cannot be read: FileNotFoundError" in missing
    with pytest.raises(DataError, match="is damaged"):
        changed.rows(1)


def test_storage_that_is_gone_for_a_moment_is_read_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    texts = source(folder, "text")
    moved = tmp_path / "000000.tar"
    away = Source(spec=texts.spec, paths=(str(moved),), bytes=texts.bytes[:1], digests=texts.digests[:1])
    waited: list[float] = []

    def pause(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            shutil.copyfile(texts.paths[0], moved)

    monkeypatch.setattr(spec.time, "sleep", pause)
    np.testing.assert_array_equal(away.rows(0), texts.rows(0))
    assert waited == list(spec.READ_AGAIN_S[:2])
