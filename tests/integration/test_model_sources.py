"""Base models in an object store: a real S3 server (moto), and each node's bounded cache of what was fetched from it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from serve_fixtures import write_model
from small_folders import small_model

from tandem.apps.resolve import resolve_models
from tandem.config import ServeConfig, ServedModelConfig
from tandem.engine.create import create_engine
from tandem.engine.spec import EngineSpec
from tandem.errors import ConfigError, EngineError, StorageError
from tandem.registry import Registry
from tandem.registry import model_cache as module
from tandem.registry.model_cache import RECORD, ModelCache, describe
from tandem.serve.replica import files as files_module
from tandem.serve.replica.files import with_files
from tandem.settings import child_environment
from tandem.storage import file_system


@pytest.fixture(scope="module")
def bucket(s3: None) -> str:
    """The URI of a bucket of this module's own."""
    file_system("s3://models").mkdir("models")
    return "s3://models"


@pytest.fixture
def uri(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of a small model; this node's cache is empty."""
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_used_copies", [])
    return put(small_model(tmp_path / "base"), f"{bucket}/{uuid.uuid4().hex}/base")


def put(folder: Path, uri: str) -> str:
    file_system(uri).put(str(folder) + "/", uri + "/", recursive=True)
    return uri


def resolved(uri: str, tmp_path: Path, **options: object) -> object:
    config = ServeConfig(models=(ServedModelConfig(model=uri, **options),))  # type: ignore[arg-type]
    with Registry(f"sqlite:///{tmp_path}/tandem.db") as registry:
        return resolve_models(config, registry)[0]


def test_a_deploy_reads_all_but_the_weights_and_a_replica_the_rest(uri: str, tmp_path: Path) -> None:
    model = resolved(f"{uri}/", tmp_path)
    assert (model.id, model.uri, model.config.engine) == ("base", uri, "vllm")
    assert model.max_length is not None
    assert not list(Path(model.path).glob("*.safetensors"))
    here = with_files(model)
    original = tmp_path / "base" / "model.safetensors"
    copy = Path(here.path) / "model.safetensors"
    assert copy.read_bytes() == original.read_bytes()
    record = json.loads((Path(here.path) / RECORD).read_text())
    assert record["sha256"]["model.safetensors"] == hashlib.sha256(original.read_bytes()).hexdigest()
    # Another replica of the node finds them.
    shutil.rmtree(tmp_path / "base")
    inode = copy.stat().st_ino
    assert with_files(model) == here and copy.stat().st_ino == inode


def test_replicas_that_start_at_once_fetch_a_model_once(uri: str, tmp_path: Path) -> None:
    script = (
        "import sys; from tandem.registry import model_cache as m\n"
        "copy = m._copy\n"
        "def counted(files, source, target):\n"
        "    sys.stdout.write(f'copied {source}\\n')\n"
        "    return copy(files, source, target)\n"
        "m._copy = counted\n"
        "print(m.ModelCache.open().fetch(m.describe(sys.argv[1])))\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, uri], stdout=subprocess.PIPE, text=True, env=child_environment()
        )
        for _ in range(3)
    ]
    shown = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    copied = [line for text in shown for line in text.splitlines() if line.startswith("copied")]
    assert len(copied) == len(set(copied)) == len(describe(uri).sizes)
    assert len({text.splitlines()[-1] for text in shown}) == 1


def test_a_model_that_changed_since_the_deploy_is_not_loaded(uri: str, tmp_path: Path) -> None:
    model = resolved(uri, tmp_path)
    (tmp_path / "base" / "generation_config.json").write_text('{"temperature": 0.5}')
    put(tmp_path / "base", uri)
    with pytest.raises(EngineError, match="has changed since the app was deployed. Deploy the app again"):
        with_files(model)
    assert resolved(uri, tmp_path).fingerprint != model.fingerprint


def test_a_node_that_has_the_files_starts_replicas_without_the_store(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = resolved(uri, tmp_path)
    here = with_files(model)
    monkeypatch.setattr(files_module, "describe", lambda uri: pytest.fail("the store was asked"))
    assert with_files(model) == here


def test_a_model_that_is_replaced_while_it_is_read_is_not_kept(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, copy = describe(uri), module._copy

    def replaced_meanwhile(files: object, source: str, target: Path) -> str:
        if target.name == "model.safetensors":
            content = bytearray((tmp_path / "base" / "model.safetensors").read_bytes())
            content[-1] ^= 1
            file_system(uri).pipe_file(source, bytes(content))
        return copy(files, source, target)

    monkeypatch.setattr(module, "_copy", replaced_meanwhile)
    cache = ModelCache.open()
    with pytest.raises(StorageError, match="changed while it was read"):
        cache.fetch(remote)
    assert [path.name for path in cache.root.iterdir() if path.is_dir()] == []


def test_what_a_killed_process_has_left_is_removed_by_the_next_fetch(uri: str) -> None:
    remote, cache = describe(uri), ModelCache.open()
    leftover = cache.root / f".{remote.fingerprint}.tmp"
    leftover.mkdir(parents=True, mode=0o700)
    (leftover / "model.safetensors").write_bytes(b"half")
    assert (cache.fetch(remote) / "model.safetensors").stat().st_size > 4
    assert not leftover.exists()


def test_a_full_disk_makes_room_and_is_named(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda path: 10)
    with pytest.raises(StorageError, match="GiB free beside models that are in use. Set TANDEM_CACHE"):
        ModelCache.open().fetch(describe(uri))


def test_a_damaged_copy_is_fetched_again(uri: str, tmp_path: Path) -> None:
    remote = describe(uri)
    copy = ModelCache.open().fetch(remote) / "model.safetensors"
    size = copy.stat().st_size
    os.truncate(copy, 10)
    assert (ModelCache.open().fetch(remote) / "model.safetensors").stat().st_size == size


def test_copies_that_no_process_uses_make_room_the_longest_unused_first(
    uri: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remotes = [describe(uri)]
    remotes += [describe(put(tmp_path / "base", f"{bucket}/{uuid.uuid4().hex}/more{number}")) for number in range(3)]
    size = remotes[0].bytes
    cache = ModelCache(tmp_path / "small", int(3.5 * size))
    for age, remote in enumerate(remotes[:3]):
        then = time.time() - 1000 + age
        os.utime(cache.fetch(remote), (then, then))
    used = module._used_copies
    for lock in used[1:]:
        lock.close()
    # The first is the longest unused, and still in use.
    cache.fetch(remotes[3])
    there = {path.name for path in cache.root.iterdir() if not path.name.startswith(".")}
    assert there == {remotes[0].fingerprint, remotes[2].fingerprint, remotes[3].fingerprint}
    with pytest.raises(StorageError, match="Raise TANDEM_MODEL_CACHE_GIB"):
        ModelCache(tmp_path / "tiny", size - 1).fetch(remotes[0])


def test_a_folder_that_is_no_model_is_refused_with_what_it_holds(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("nothing")
    where = put(tmp_path / "notes", f"{bucket}/{uuid.uuid4().hex}/notes")
    with pytest.raises(ConfigError, match=r"no model at .*: it has no config.json \(it holds notes.txt\)"):
        resolved(where, tmp_path)
    with pytest.raises(ConfigError, match="it holds nothing"):
        resolved(f"{bucket}/nothing", tmp_path)
    with pytest.raises(StorageError, match="no store that fsspec knows"):
        resolved("nosuch://bucket/model", tmp_path)


@pytest.mark.slow  # vLLM starts: 40 s
async def test_vllm_generates_with_a_model_of_a_store(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    where = put(write_model(tmp_path / "real"), f"{bucket}/{uuid.uuid4().hex}/real")
    model = with_files(resolved(where, tmp_path, engine_args={"max_model_len": 128}))
    spec = EngineSpec(kind="vllm", id="real", name="real", path=model.path, args={"max_model_len": 128})
    engine = create_engine(spec)
    await engine.start()
    try:
        assert engine.healthy
    finally:
        await engine.drain(0)
