"""Datasets of the Hugging Face hub as sources of a build: the real client against a server that speaks the hub's API."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import FakeHub
from typer.testing import CliRunner

from tandem.cli.data import data_app
from tandem.data.build import build_dataset
from tandem.data.sources.corpus import pull_files
from tandem.errors import DataError, HubError
from tandem.registry.hub import HubDataset

NAME = "org/questions"
SOURCE = f"hf://datasets/{NAME}"


def lines(*words: str) -> bytes:
    return "".join(json.dumps({"prompt": f"What is {w}?", "answer": f"{w} is a word."}) + "\n" for w in words).encode()


def parquet(*words: str) -> bytes:
    buffer = io.BytesIO()
    rows = {"question": [f"What is {w}?" for w in words], "answer": [f"{w} is a word." for w in words]}
    pq.write_table(pa.table(rows), buffer)
    return buffer.getvalue()


def run(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(data_app, list(args), env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


def test_a_build_takes_the_training_split_and_keeps_the_commit(
    hub: FakeHub, tandem_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = hub.dataset(
        NAME,
        {
            "README.md": b"# Questions",
            "data/train-00000-of-00002.parquet": parquet("cat", "dog"),
            "data/train-00001-of-00002.parquet": parquet("hill"),
            "data/test-00000-of-00001.parquet": parquet("sea"),
        },
    )
    target = tandem_home / "data" / "questions"
    index = build_dataset(SOURCE, target, vocab_size=300)
    assert (index.kind, index.samples) == ("pairs", 3)
    assert index.source == f"{SOURCE}@{repo.refs['main']}"
    assert len(hub.downloads()) == 2
    # By its commit it is built again without the hub, also when the branch has moved.
    repo.commit({"data/train.parquet": parquet("other")})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = build_dataset(index.source, target, vocab_size=300, replace=True)
    assert (again.digest, again.source) == (index.digest, index.source)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("main", ["main/train.jsonl"]),
        ("main/test.jsonl", ["main/test.jsonl"]),
        ("main/*.jsonl", ["main/test.jsonl", "main/train.jsonl"]),
        ("*/train.jsonl", None),
        ("notes.txt", ["notes.txt"]),
    ],
)
def test_a_path_names_a_file_a_folder_or_a_pattern(hub: FakeHub, path: str, found: list[str] | None) -> None:
    files = {
        "main/train.jsonl": lines("cat"), "main/test.jsonl": lines("dog"), "socratic/train.jsonl": lines("sea"),
        "notes.txt": b"some text",
    }  # fmt: skip
    hub.dataset(NAME, files)
    if found is None:
        with pytest.raises(
            HubError, match=r"in 2 folders \(main, socratic\). Name one: hf://datasets/org/questions/main\."
        ):
            pull_files(f"{SOURCE}/{path}")
        return
    paths = [path.as_posix().partition("/snapshots/")[2] for path in pull_files(f"{SOURCE}/{path}").paths]
    assert [path.partition("/")[2] for path in paths] == found
    assert len(hub.downloads()) == len(found)


@pytest.mark.parametrize(
    ("files", "source", "said"),
    [
        (
            {"a/train.jsonl": b"", "b/train.jsonl": b""},
            SOURCE,
            r"files in 2 folders \(a, b\)\. Name one: .*/questions/a",
        ),
        (
            {"train.jsonl": b"", "train.parquet": b""},
            SOURCE,
            r"files of 2 sorts \(\.jsonl, \.parquet\)\. Name one: .*/\*\.jsonl",
        ),
        ({"script.py": b"", "README.md": b""}, SOURCE, r"no file that can be read .*@refs%2Fconvert%2Fparquet"),
        ({"train.jsonl": b""}, f"{SOURCE}/trian.jsonl", r"holds no file trian\.jsonl.*Did you mean 'train\.jsonl'"),
        ({"train.jsonl": b""}, f"{SOURCE}@v9", r"The dataset org/questions of the hub has no revision 'v9'"),
        ({"train.jsonl": b""}, "hf://datasets/org/qestions", r"has no dataset org/qestions"),
    ],
)
def test_what_is_not_there_or_not_clear_is_said_before_a_download(
    hub: FakeHub, files: dict[str, bytes], source: str, said: str
) -> None:
    hub.dataset(NAME, files)
    with pytest.raises(HubError, match=said):
        pull_files(source)
    assert not hub.downloads()


def test_the_command_pulls_and_tells_how_to_build(hub: FakeHub, tandem_home: Path) -> None:
    commit = hub.dataset(NAME, {"train.jsonl": lines("cat", "dog") * 20}).refs["main"]
    status, out, err = run("pull", NAME)
    assert status == 0, err
    assert f"{NAME}: 1 file, 0.0 MiB, commit {commit[:12]}" in out
    assert f"tandem data build {SOURCE}@{commit} NAME" in out
    status, out, err = run("build", f"{SOURCE}@{commit}", "mine", "--vocab-size", "300")
    assert status == 0, err
    assert "40 question-answer pairs" in out
    assert len(hub.downloads()) == 1


def test_a_tokenizer_comes_from_a_model_of_the_hub(hub: FakeHub, tandem_home: Path, tmp_path: Path) -> None:
    hub.dataset(NAME, {"train.jsonl": lines("cat", "dog")})
    assert run("build", SOURCE, "first", "--vocab-size", "300")[0] == 0
    folder = tandem_home / "data" / "first" / "tokenizer"
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    hub.model("org/model", {**files, "config.json": b"{}", "model.safetensors": b"x"})
    status, _, err = run("build", SOURCE, "second", "--tokenizer", "org/model")
    assert status == 0, err
    assert (tandem_home / "data" / "second" / "tokenizer" / "tokenizer.json").read_bytes() == files["tokenizer.json"]
    status, _, err = run("build", SOURCE, "third", "--tokenizer", "org/modle")
    assert status == 2 and "No tokenizer at org/modle" in err and "Did you mean 'org/model'?" in err


@pytest.mark.parametrize("text", ["hf://datasets/org", "org", "hf://datasets/org/na me", "hf://datasets/org/name@"])
def test_what_is_no_name_of_a_dataset_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(DataError, match="names no dataset of the hub. Its form is hf://datasets/org/name"):
        HubDataset.parse(text)


def test_a_reference_is_written_as_it_is_read() -> None:
    for text in (SOURCE, f"{SOURCE}@v1", f"{SOURCE}@refs%2Fconvert%2Fparquet/main/train", f"{SOURCE}/a/b.jsonl"):
        assert str(HubDataset.parse(text)) == text
