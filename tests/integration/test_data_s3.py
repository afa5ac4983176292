"""Datasets in an object store: a real S3 server (moto) through s3fs; the rows are those of the same folder on a disk."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pytest

from tandem.data.build import build_dataset
from tandem.data.heldout import evaluation_rows
from tandem.data.index import TOKENIZER_NAME, Part, find_dataset
from tandem.data.spec import Source
from tandem.data.tokenize import TextEncoder
from tandem.errors import DataError
from tandem.storage import file_system, is_remote


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of several shards on this disk."""
    top = tmp_path_factory.mktemp("data")
    (top / "text.txt").write_text("\n\n".join(f"paragraph {number} with some words to read" for number in range(200)))
    build_dataset(str(top / "text.txt"), top / "text", vocab_size=300, shard_bytes=1000)
    return top / "text"


@pytest.fixture
def uri(s3: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    files = file_system("s3://datasets")
    if not files.exists("s3://datasets"):
        files.mkdir("datasets")
    where = f"s3://datasets/{uuid.uuid4().hex}/text"
    files.put(f"{folder}/", f"{where}/", recursive=True)
    return where


def source(part: Part) -> Source:
    return Source.of(part, TextEncoder(str(part.folder / TOKENIZER_NAME)), length=32, loss_on_all=True)


def test_the_rows_of_a_dataset_in_a_store_are_those_of_its_folder(uri: str, folder: Path) -> None:
    here, there = find_dataset(str(folder)), find_dataset(f"{uri}/")
    assert there.location == uri and there.index == here.index and len(here.index.shards) > 3
    local, remote = source(here), source(there)
    assert all(is_remote(path) for path in remote.paths) and remote.digests == local.digests
    for shard in range(len(local.paths)):
        np.testing.assert_array_equal(remote.rows(shard), local.rows(shard))
    np.testing.assert_array_equal(
        evaluation_rows(there.location, there.index, remote.spec, 5),
        evaluation_rows(here.location, here.index, local.spec, 5),
    )
    # The shards themselves are not copied.
    assert not list(there.folder.rglob("*.tar"))


def test_a_shard_that_was_changed_in_the_store_is_named(uri: str) -> None:
    there = find_dataset(uri)
    first = source(there).paths[0]
    files = file_system(uri)
    content = bytearray(files.cat_file(first))
    content[600] ^= 1
    files.pipe_file(first, bytes(content))
    with pytest.raises(DataError, match=rf"{first} is damaged: its bytes are not those"):
        source(there).rows(0)
    files.rm_file(first)
    with pytest.raises(DataError, match=rf"{first} is missing"):
        find_dataset(uri)


def test_what_is_no_dataset_in_a_store_is_said(uri: str) -> None:
    with pytest.raises(DataError, match=r"is not a dataset: it holds no index.json"):
        find_dataset(f"{uri}/shards")


def test_a_dataset_that_was_replaced_in_the_store_has_its_new_index(uri: str, tmp_path: Path) -> None:
    before = find_dataset(uri)
    (tmp_path / "other.txt").write_text("\n\n".join(f"another text {number}" for number in range(100)))
    build_dataset(str(tmp_path / "other.txt"), tmp_path / "other", vocab_size=300, shard_bytes=1000)
    file_system(uri).rm(uri, recursive=True)
    file_system(uri).put(f"{tmp_path}/other/", f"{uri}/", recursive=True)
    after = find_dataset(uri)
    assert after.index.digest != before.index.digest and after.folder != before.folder
