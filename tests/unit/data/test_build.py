"""A dataset is there whole or not at all, and equal corpora give equal datasets."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import webdataset

from tandem.data.build import build_dataset
from tandem.data.index import DatasetIndex
from tandem.errors import DataError, StorageError
from tandem.ids import file_digest


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"What is {n}?", "answer": f"It is {n}."}) + "\n" for n in range(100))
    )
    return str(path)


def test_shards_are_read_by_the_webdataset_package_and_the_index_knows_their_digests(tmp_path: Path, pairs: str):
    built = build_dataset(pairs, tmp_path / "data", vocab_size=300)
    assert built == DatasetIndex.load(tmp_path / "data")
    assert (built.kind, built.samples, sum(s.samples for s in built.shards)) == ("pairs", 100, 100)
    assert len(built.shards) >= 8
    paths = built.shard_paths(tmp_path / "data")
    assert [file_digest(path) for path in paths] == [shard.sha256 for shard in built.shards]
    samples = webdataset.WebDataset([str(path) for path in paths], shardshuffle=False)
    found = [json.loads(sample["json"])["answer"] for sample in samples]
    assert found == [f"It is {n}." for n in range(100)]


def test_preferences_are_written_and_read_back(tmp_path: Path):
    from tandem.data.shards import read_samples
    from tandem.data.sources.samples import Preference

    lines = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "Nothing."} for n in range(60)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    built = build_dataset(str(tmp_path / "p.jsonl"), tmp_path / "data", vocab_size=300)
    assert (built.kind, built.samples) == ("preferences", 60)
    paths = built.shard_paths(tmp_path / "data")
    assert len(paths) > 4
    assert list(read_samples(paths)) == [Preference(**line) for line in lines]
    samples = webdataset.WebDataset([str(path) for path in paths], shardshuffle=False)
    assert [json.loads(sample["json"]) for sample in samples] == lines


def test_preferences_of_openais_format_keep_their_chats(tmp_path: Path):
    from tandem.data.shards import read_samples
    from tandem.data.sources.samples import Message, Preference

    line = {
        "input": {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]},
        "preferred_output": [{"role": "assistant", "content": "That."}],
        "non_preferred_output": [{"role": "assistant", "content": "I am not sure, but maybe that."}],
    }
    (tmp_path / "p.jsonl").write_text(json.dumps(line) + "\n")
    built = build_dataset(str(tmp_path / "p.jsonl"), tmp_path / "data", vocab_size=300)
    turns = (Message("system", "Be brief."), Message("user", "What?"))
    assert list(read_samples(built.shard_paths(tmp_path / "data"))) == [
        Preference(turns, "That.", "I am not sure, but maybe that.")
    ]
    for broken, message in (
        ({**line, "input": {}}, "line 1: 'input' of a preference must be an object with messages"),
        ({**line, "preferred_output": []}, "line 1: 'input' is empty"),
        ({**line, "preferred_output": line["input"]["messages"]}, "outputs of one message of the assistant"),  # type: ignore[index]
    ):
        (tmp_path / "broken.jsonl").write_text(json.dumps(broken) + "\n")
        with pytest.raises(DataError, match=message):
            build_dataset(str(tmp_path / "broken.jsonl"), tmp_path / "other", vocab_size=300)


def test_the_same_corpus_gives_the_same_digest_and_another_another(tmp_path: Path, pairs: str):
    first, second = (build_dataset(pairs, tmp_path / name, vocab_size=300) for name in "ab")
    assert (first.digest, first.tokenizer_digest) == (second.digest, second.tokenizer_digest)
    assert build_dataset(pairs, tmp_path / "c", vocab_size=300, limit=50).digest != first.digest


def test_the_bytes_of_a_shard_are_those_of_every_version_before(tmp_path: Path):
    from tandem.data.shards import write_shards
    from tandem.data.sources.samples import Chat, Message, Pair, Preference, Text

    samples = [
        Text("naïve 1"),
        Pair("q", "a"),
        Chat((Message("user", "hé"), Message("assistant", "b"))),
        Preference("p", "c", "r"),
        Text("x" * 30000),
    ]
    (shard,) = write_shards(samples, tmp_path, shard_bytes=10_000)
    # As `tarfile` wrote it before `webdataset` did: datasets of then keep their digest, and their runs go on.
    assert (shard.bytes, shard.sha256[:16]) == (40960, "c1905e15790b68a9")
    assert file_digest(tmp_path / shard.name) == shard.sha256


def test_a_corpus_with_nothing_in_it_is_refused_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n\n')
    with pytest.raises(DataError, match="no usable row"):
        build_dataset(str(tmp_path / "empty.jsonl"), tmp_path / "data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.jsonl"]


def test_a_bad_line_leaves_nothing(tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{nonsense\n')
    with pytest.raises(DataError, match="line 2"):
        build_dataset(str(tmp_path / "bad.jsonl"), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, pairs: str, monkeypatch: pytest.MonkeyPatch):
    # /dev/full refuses every write with ENOSPC, for root too.
    real = Path.open
    full = Path("/dev/full")
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: real(full if path.suffix == ".tar" else path, *a, **k))
    with pytest.raises(StorageError, match="disk is full while writing shards") as caught:
        build_dataset(pairs, tmp_path / "data", vocab_size=300)
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENOSPC
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs.jsonl"]


def test_an_existing_dataset_is_not_overwritten_unasked(tmp_path: Path, pairs: str):
    build_dataset(pairs, tmp_path / "data", vocab_size=300)
    with pytest.raises(StorageError, match="exists already"):
        build_dataset(pairs, tmp_path / "data", vocab_size=300)
    assert build_dataset(pairs, tmp_path / "data", vocab_size=300, limit=20, replace=True).samples == 20


def test_a_damaged_index_or_shard_is_refused(tmp_path: Path, pairs: str):
    built = build_dataset(pairs, tmp_path / "data", vocab_size=300)
    shard = built.shard_paths(tmp_path / "data")[0]
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DataError, match="bytes instead of"):
        DatasetIndex.load(tmp_path / "data")
    shard.unlink()
    with pytest.raises(DataError, match="is missing"):
        DatasetIndex.load(tmp_path / "data")
    (tmp_path / "data" / "index.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        DatasetIndex.load(tmp_path / "data")
    with pytest.raises(DataError, match="not a dataset"):
        DatasetIndex.load(tmp_path)


def test_progress_tells_the_stages_in_order(tmp_path: Path, pairs: str):
    seen: list[str] = []
    build_dataset(pairs, tmp_path / "data", vocab_size=300, progress=lambda stage, done, total: seen.append(stage))
    assert list(dict.fromkeys(seen)) == ["reading", "tokenizer", "shards"]


def test_another_datasets_tokenizer_can_be_taken(tmp_path: Path, pairs: str):
    first = build_dataset(pairs, tmp_path / "a", vocab_size=300)
    second = build_dataset(pairs, tmp_path / "b", tokenizer=tmp_path / "a" / "tokenizer")
    assert first.tokenizer_digest == second.tokenizer_digest
    with pytest.raises(DataError, match="no tokenizer.json"):
        build_dataset(pairs, tmp_path / "c", tokenizer=tmp_path)
