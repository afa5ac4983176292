"""The registry's promises, on a real SQLite file."""

from __future__ import annotations

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from tandem.errors import ConfigError, RegistryError, UnknownModelError
from tandem.ids import folder_digest
from tandem.registry import Registry


def test_a_registered_model_comes_back_whole(registry, model_folder):
    folder = model_folder()
    lineage = {"job": "base-0123", "steps": 100, "loss": 2.5, "nested": {"données": [1, None]}}
    record = registry.register_model("base", folder, lineage=lineage)
    assert (record.id, record.version, record.kind, record.path) == ("base@1", 1, "model", folder)
    assert record.digest == folder_digest(folder)
    assert (record.max_length, record.base, record.rank) == (512, None, None)
    assert record.lineage == lineage
    assert record.created_at.tzinfo == UTC and datetime.now(UTC) - record.created_at < timedelta(minutes=1)
    assert registry.resolve("base") == registry.resolve("base@1") == record


def test_an_adapter_keeps_its_rank_and_the_id_of_its_base(registry, model_folder, adapter_folder):
    registry.register_model("base", model_folder())
    record = registry.register_adapter("helper", adapter_folder(), base="base")
    assert (record.id, record.kind, record.base, record.rank) == ("helper@1", "adapter", "base@1", 16)
    assert record.max_length is None


def test_the_same_content_gives_the_same_version_and_leaves_the_revision(registry, model_folder):
    first = registry.register_model("base", model_folder("a"), lineage={"job": "one"})
    before = registry.revision()
    assert registry.register_model("base", model_folder("b"), lineage={"job": "two"}) == first
    assert registry.revision() == before


def test_other_content_gives_the_next_version_and_the_bare_name_means_the_newest(registry, model_folder):
    registry.register_model("base", model_folder("a", b"1"))
    second = registry.register_model("base", model_folder("b", b"2"))
    assert second.id == "base@2"
    assert registry.resolve("base") == second
    assert registry.resolve("base@1").path.name == "a"


def test_the_same_content_is_a_new_version_when_the_old_folder_is_gone(registry, model_folder):
    gone = model_folder("a")
    registry.register_model("base", gone)
    shutil.rmtree(gone)
    record = registry.register_model("base", model_folder("b"))
    assert record.id == "base@2" and record.path.is_dir()


def test_the_same_adapter_on_another_base_is_a_new_version(registry, model_folder, adapter_folder):
    registry.register_model("base", model_folder("a", b"1"))
    folder = adapter_folder()
    registry.register_adapter("helper", folder, base="base")
    registry.register_model("base", model_folder("b", b"2"))
    assert registry.register_adapter("helper", folder, base="base").base == "base@2"
    assert registry.register_adapter("helper", folder, base="base@1").id == "helper@3"


def test_an_id_is_never_given_out_twice_even_after_removal(registry, model_folder):
    registry.register_model("base", model_folder("a", b"1"))
    registry.remove("base")
    assert registry.register_model("base", model_folder("a", b"1")).id == "base@2"


def test_an_unknown_name_is_refused_with_the_nearest(registry, model_folder):
    registry.register_model("stdlib-base", model_folder())
    with pytest.raises(UnknownModelError, match=r"'stdlib-bsae'.*Did you mean 'stdlib-base'\?"):
        registry.resolve("stdlib-bsae")


def test_an_unknown_version_is_refused_with_those_that_exist(registry, model_folder):
    registry.register_model("base", model_folder("a", b"1"))
    registry.register_model("base", model_folder("b", b"2"))
    with pytest.raises(UnknownModelError, match="no version 7; it has 2, 1"):
        registry.resolve("base@7")


def test_an_empty_registry_says_so(registry):
    assert registry.list() == [] and registry.newest_model() is None
    with pytest.raises(UnknownModelError, match="Nothing is registered yet"):
        registry.resolve("anything")


def test_a_name_is_a_model_or_an_adapter_never_both(registry, model_folder, adapter_folder):
    registry.register_model("base", model_folder())
    registry.register_adapter("helper", adapter_folder(), base="base")
    with pytest.raises(RegistryError, match="base is registered as a model, so it cannot be an adapter too"):
        registry.register_adapter("base", adapter_folder(), base="base")
    with pytest.raises(RegistryError, match="helper is registered as an adapter"):
        registry.register_model("helper", model_folder())


def test_an_adapter_needs_a_registered_model_as_its_base(registry, model_folder, adapter_folder):
    with pytest.raises(UnknownModelError):
        registry.register_adapter("helper", adapter_folder(), base="base")
    registry.register_model("base", model_folder())
    registry.register_adapter("helper", adapter_folder(), base="base")
    with pytest.raises(RegistryError, match="helper@1 is an adapter of base@1"):
        registry.register_adapter("second", adapter_folder("two", b"2"), base="helper")


@pytest.mark.parametrize("name", ["", "a/b", "../up", "x@2", "-x", "x" * 97])
def test_a_name_that_cannot_be_one_is_refused(registry, model_folder, name):
    with pytest.raises(ConfigError, match="model name"):
        registry.register_model(name, model_folder())


def test_list_shows_the_newest_of_each_name_or_everything(registry, model_folder, adapter_folder):
    registry.register_model("zebra", model_folder("a", b"1"))
    registry.register_model("zebra", model_folder("b", b"2"))
    registry.register_adapter("ant", adapter_folder(), base="zebra@1")
    assert [r.id for r in registry.list()] == ["ant@1", "zebra@2"]
    assert [r.id for r in registry.list("model")] == ["zebra@2"]
    assert [r.id for r in registry.list("adapter")] == ["ant@1"]
    assert [r.id for r in registry.list(all_versions=True)] == ["ant@1", "zebra@1", "zebra@2"]


def test_the_newest_model_is_the_one_registered_last_and_never_an_adapter(registry, model_folder, adapter_folder):
    registry.register_model("zebra", model_folder("a", b"1"))
    registry.register_model("ant", model_folder("b", b"2"))
    registry.register_adapter("helper", adapter_folder(), base="zebra")
    assert registry.newest_model().id == "ant@1"


def test_a_base_that_adapters_need_is_not_removed(registry, model_folder, adapter_folder):
    registry.register_model("base", model_folder())
    registry.register_adapter("helper", adapter_folder(), base="base")
    before = registry.revision()
    with pytest.raises(RegistryError, match="base is the base of helper@1, 1 in all"):
        registry.remove("base")
    assert registry.revision() == before
    assert [r.id for r in registry.remove("helper")] == ["helper@1"]
    assert [r.id for r in registry.remove("base")] == ["base@1"]
    assert registry.list() == []


def test_remove_by_id_forgets_that_version_and_leaves_the_files(registry, model_folder):
    first = registry.register_model("base", model_folder("a", b"1"))
    registry.register_model("base", model_folder("b", b"2"))
    assert registry.remove("base@1") == [first]
    assert [r.id for r in registry.list(all_versions=True)] == ["base@2"]
    assert first.path.is_dir()


def test_remove_by_name_returns_every_version_oldest_first(registry, model_folder):
    registry.register_model("base", model_folder("a", b"1"))
    registry.register_model("base", model_folder("b", b"2"))
    assert [r.id for r in registry.remove("base")] == ["base@1", "base@2"]
    with pytest.raises(UnknownModelError):
        registry.remove("base")


def test_the_revision_grows_with_each_change(registry, model_folder):
    seen = [registry.revision()]
    registry.register_model("base", model_folder("a", b"1"))
    seen.append(registry.revision())
    registry.register_model("base", model_folder("b", b"2"))
    seen.append(registry.revision())
    registry.remove("base@1")
    seen.append(registry.revision())
    assert seen == sorted(set(seen))


def test_another_registry_on_the_same_file_sees_the_change(registry, model_folder):
    other = Registry(registry.url)
    record = registry.register_model("base", model_folder())
    assert other.resolve("base") == record
    assert other.revision() == registry.revision()


def test_threads_share_a_registry(registry, model_folder):
    folders = [model_folder(f"m{i}", bytes([i])) for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        records = list(pool.map(lambda folder: registry.register_model("base", folder), folders))
        found = list(pool.map(registry.resolve, [record.id for record in records]))
    assert found == records
    assert sorted(record.version for record in records) == list(range(1, 13))


def test_a_pickled_registry_opens_the_same_database(registry, model_folder):
    record = registry.register_model("base", model_folder())
    assert pickle.loads(pickle.dumps(registry)).resolve("base") == record


def test_open_follows_the_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "my home"))
    monkeypatch.delenv("TANDEM_DATABASE_URL", raising=False)
    assert Registry.open().list() == []
    assert (tmp_path / "my home" / "tandem.db").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f), "no folder"),
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no \\*.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), "cannot be read as JSON"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(registry, model_folder, spoil, message):
    folder = model_folder()
    spoil(folder)
    with pytest.raises(RegistryError, match=message):
        registry.register_model("base", folder)
    assert registry.list() == []


@pytest.mark.parametrize("rank", [None, "16", 0, -1, True, 1.5])
def test_an_adapter_without_a_whole_rank_is_refused(registry, model_folder, adapter_folder, rank):
    registry.register_model("base", model_folder())
    with pytest.raises(RegistryError, match="must be a rank of at least 1"):
        registry.register_adapter("helper", adapter_folder(rank=rank), base="base")


def test_registering_an_adapter_as_a_model_says_what_it_is(registry, adapter_folder):
    with pytest.raises(RegistryError, match=r"It has adapter_config\.json: register it as adapter"):
        registry.register_model("base", adapter_folder())


def test_an_adapter_without_weights_is_refused(registry, model_folder, adapter_folder):
    registry.register_model("base", model_folder())
    folder = adapter_folder()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(RegistryError, match=r"no adapter_model\.safetensors"):
        registry.register_adapter("helper", folder, base="base")


def test_a_multimodal_config_gives_the_length_of_its_language_model(registry, model_folder):
    folder = model_folder(config={"text_config": {"max_position_embeddings": 2048}})
    assert registry.register_model("base", folder).max_length == 2048
    assert registry.register_model("odd", model_folder("odd", config={})).max_length is None


def test_a_lineage_that_is_not_json_is_refused(registry, model_folder):
    with pytest.raises(RegistryError, match="lineage of base cannot be kept as JSON"):
        registry.register_model("base", model_folder(), lineage={"when": datetime.now(UTC)})
