"""Adapters in an object store: a real S3 server (moto), and this node's bounded cache of what was fetched from it."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from pathlib import Path

import pytest
from small_folders import small_adapter, small_model

from tandem.engine.protocol import AdapterRef
from tandem.errors import AdapterError, StorageError
from tandem.registry import Registry, local_folder
from tandem.registry.adapter_cache import RECENT_USE_S, AdapterCache
from tandem.registry.adapter_files import WEIGHTS, adapter_digest
from tandem.serve.replica.adapter_checks import AdapterChecker
from tandem.storage import file_system


@pytest.fixture(scope="module")
def bucket(s3: None) -> str:
    """The URI of a bucket of this module's own."""
    file_system("s3://adapters").mkdir("adapters")
    return "s3://adapters"


@pytest.fixture
def uri(bucket: str) -> str:
    return f"{bucket}/{uuid.uuid4().hex}/red"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    registry = Registry(f"sqlite:///{tmp_path}/tandem.db")
    registry.register_model("base", small_model(tmp_path / "base"))
    return registry


def put(folder: Path, uri: str) -> Path:
    """Send a folder, with a file that is none of an adapter's."""
    (folder / "README.md").write_text("made elsewhere")
    file_system(uri).put(str(folder) + "/", uri + "/", recursive=True)
    return folder


def forget_copies(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "cache")


def test_an_adapter_in_a_store_is_fetched_when_a_node_first_uses_it(registry: Registry, uri: str, tmp_path: Path):
    folder = put(small_adapter(tmp_path / "red"), uri)
    record = registry.register_adapter("red", f"{uri}/", base="base")
    assert (record.uri, record.rank, record.digest) == (uri, 16, adapter_digest(folder))
    forget_copies(tmp_path)
    assert not record.path.exists()
    found = local_folder(Registry(registry.url).resolve("red"))
    assert found == record.path and {p.name for p in found.iterdir()} == {"adapter_config.json", WEIGHTS}
    assert (found / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    # Used again, it is not fetched again.
    file_system(uri).rm(uri, recursive=True)
    assert local_folder(record) == found


def test_a_replica_brings_it_to_its_node_before_its_engine_hears_of_it(registry: Registry, uri: str, tmp_path: Path):
    put(small_adapter(tmp_path / "red"), uri)
    record = registry.register_adapter("red", uri, base="base")
    forget_copies(tmp_path)
    ref = AdapterRef.of(record)
    assert ref.path == uri
    assert AdapterChecker(tmp_path / "base", 16)(ref).path == str(record.path) and record.path.is_dir()
    with pytest.raises(AdapterError, match="rank 16; its base is served with max_lora_rank 8"):
        AdapterChecker(tmp_path / "base", 8)(ref)


def test_what_changed_in_the_store_is_refused_with_both_digests(registry: Registry, uri: str, tmp_path: Path):
    put(small_adapter(tmp_path / "red"), uri)
    record = registry.register_adapter("red", uri, base="base")
    put(small_adapter(tmp_path / "red", "other"), uri)
    forget_copies(tmp_path)
    with pytest.raises(AdapterError, match=f"has changed since it was registered: its digest was {record.digest[:12]}"):
        local_folder(record)


def test_a_bad_adapter_in_a_store_is_refused_at_registration(registry: Registry, uri: str, tmp_path: Path):
    put(small_adapter(tmp_path / "red", modules_to_save=["lm_head"]), uri)
    with pytest.raises(AdapterError, match="modules_to_save"):
        registry.register_adapter("red", uri, base="base")
    folder = small_adapter(tmp_path / "pickled")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    put(folder, f"{uri}-pickled")
    with pytest.raises(AdapterError, match=r"holds no adapter_model\.safetensors.*adapter_model\.bin"):
        registry.register_adapter("red", f"{uri}-pickled", base="base")
    assert registry.list("adapter") == []


def test_a_store_that_does_not_answer_is_no_fault_of_the_adapter(registry: Registry):
    with pytest.raises(StorageError, match="no store that fsspec knows"):
        registry.register_adapter("red", "nosuch://bucket/red", base="base")
    with pytest.raises((StorageError, AdapterError), match="s3://no-such-bucket/red"):
        registry.register_adapter("red", "s3://no-such-bucket/red", base="base")


def test_the_cache_keeps_its_limit_and_the_longest_unused_goes_first(uri: str, tmp_path: Path):
    size = sum(p.stat().st_size for p in small_adapter(tmp_path / "a0").iterdir())
    cache = AdapterCache(tmp_path / "cache", 2 * size + size // 2)
    digests = []
    for number in range(3):
        put(small_adapter(tmp_path / f"a{number}", str(number)), f"{uri}{number}")
        digests.append(cache.fetch(f"{uri}{number}")[1])
    # All were used just now: none goes.
    assert all(cache.folder_of(digest).is_dir() for digest in digests)
    for age, digest in enumerate(digests):
        then = time.time() - 10 * RECENT_USE_S + age
        os.utime(cache.folder_of(digest), (then, then))
    cache.get(f"{uri}0", digests[0])
    assert cache.make_room() == [digests[1]]
    assert [cache.folder_of(digest).is_dir() for digest in digests] == [True, False, True]
    # What went is fetched again.
    assert cache.get(f"{uri}1", digests[1]) == cache.folder_of(digests[1])
    assert not [p.name for p in cache.root.iterdir() if p.name.startswith(".")]
    with pytest.raises(AdapterError, match="Raise TANDEM_ADAPTER_CACHE_GIB"):
        AdapterCache(tmp_path / "small", size - 1).fetch(f"{uri}0")
