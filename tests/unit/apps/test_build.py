from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub

from tandem.apps import resolve as resolve_module
from tandem.apps.build import application, build_app, prepare
from tandem.apps.resolve import resolve, resolve_models
from tandem.config import RouterConfig, ServeConfig, ServedModelConfig, from_dict, to_dict
from tandem.errors import ConfigError, RegistryError, UnknownModelError
from tandem.registry import Registry, find_model
from tandem.serve.scaling import engine_version


@pytest.fixture
def registry(tandem_home: Path) -> Registry:
    return Registry(f"sqlite:///{tandem_home}/tandem.db")


def model(folder: Path, size: int = 1) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    (folder / "model.safetensors").write_bytes(b"\0" * size)
    return folder


def config(*models: ServedModelConfig) -> ServeConfig:
    return ServeConfig(models=models)


def test_the_newest_registered_model_is_served_when_none_is_named(registry: Registry, tmp_path: Path) -> None:
    registry.register_model("one", model(tmp_path / "one"))
    registry.register_model("two", model(tmp_path / "two", 2))
    (served,) = resolve_models(ServeConfig(), registry)
    assert (served.id, served.name, served.max_length) == ("two@1", "two", 64)


def test_an_empty_registry_says_what_to_do(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="none is registered"):
        resolve_models(ServeConfig(), registry)


def test_a_name_an_id_and_a_folder_can_be_served_and_given_another_name(registry: Registry, tmp_path: Path) -> None:
    registry.register_model("one", model(tmp_path / "one"))
    registry.register_model("one", model(tmp_path / "one-2", 2))
    folder = model(tmp_path / "plain")
    served = resolve_models(
        config(
            ServedModelConfig(model="one"),
            ServedModelConfig(model="one@1", name="old"),
            ServedModelConfig(model=str(folder)),
        ),
        registry,
    )
    assert [(s.id, s.name) for s in served] == [("one@2", "one"), ("one@1", "old"), ("plain", "plain")]


def test_one_version_is_one_deployment_however_it_is_named(registry: Registry, tmp_path: Path) -> None:
    registry.register_model("one", model(tmp_path / "one"))
    folder = model(tmp_path / "plain")
    names = [config(ServedModelConfig(model="one")), config(ServedModelConfig(model="one@1")), ServeConfig()]
    versions = [engine_version(resolve_models(each, registry)[0], "") for each in names]
    assert len(set(versions)) == 1
    # A config that names the versions is the same app, and stays so when another model is registered.
    kept = resolve(config(ServedModelConfig(model="one", replicas=2), ServedModelConfig(model=str(folder)))).config
    registry.register_model("two", model(tmp_path / "two", 2))
    assert [each.model for each in kept.models] == ["one@1", str(folder)] and resolve(kept).config == kept
    assert from_dict(ServeConfig, to_dict(kept)) == kept


def test_models_are_resolved_once_for_each_deploy(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.register_model("one", model(tmp_path / "one"))
    names: list[str] = []

    def count(word: str, *args: Any) -> Any:
        names.append(word)
        return find_model(word, *args)

    monkeypatch.setattr(resolve_module, "find_model", count)
    planned = prepare(config(ServedModelConfig(model="one")))
    application(planned)
    assert names == ["one"] and planned.app.config.models[0].model == "one@1"


def test_unknown_names_and_folders_are_refused_with_the_nearest(registry: Registry, tmp_path: Path) -> None:
    registry.register_model("story", model(tmp_path / "story"))
    with pytest.raises(UnknownModelError, match="'story'"):
        resolve_models(config(ServedModelConfig(model="stori")), registry)
    with pytest.raises(ConfigError, match="Did you mean 'story'"):
        resolve_models(config(ServedModelConfig(model=str(tmp_path / "storry"))), registry)


def test_one_model_twice_is_refused(registry: Registry, tmp_path: Path) -> None:
    registry.register_model("one", model(tmp_path / "one"))
    with pytest.raises(ConfigError, match="replicas"):
        resolve_models(config(ServedModelConfig(model="one"), ServedModelConfig(model="one@1", name="b")), registry)


def test_a_wrong_engine_argument_is_refused_before_anything_starts(registry: Registry, tmp_path: Path) -> None:
    folder = model(tmp_path / "one")
    wrong = ServedModelConfig(model=str(folder), engine="echo", engine_args={"delays": 1})
    with pytest.raises(ConfigError, match="Did you mean 'delay_s'"):
        build_app(config(wrong))


def test_an_unknown_policy_is_refused_before_anything_starts(registry: Registry) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'affinity'"):
        build_app(ServeConfig(router=RouterConfig(policy="afinity")))


def test_other_resources_than_cpus_and_gpus_are_reserved_by_their_names(registry: Registry, tmp_path: Path) -> None:
    served = ServedModelConfig(
        model=str(model(tmp_path / "one")), cpus_per_replica=0.5, resources_per_replica={"fast_disk": 2.0}
    )
    app = build_app(config(served), check=False)
    # Of the gateway's arguments the fifth names the replicas.
    (engine,) = app._bound_deployment.init_args[4]
    options = engine._bound_deployment.ray_actor_options
    assert options["resources"] == {"fast_disk": 2.0} and options["num_cpus"] == 0.5
    with pytest.raises(
        ConfigError, match=r"names gpu, which has a setting of its own. Set models\[\].gpus_per_replica"
    ):
        ServedModelConfig(model="x", resources_per_replica={"gpu": 1.0})


def test_what_the_dispatcher_reads_of_the_config_decides_whether_it_is_replaced(
    registry: Registry, tmp_path: Path
) -> None:
    served = config(ServedModelConfig(model=str(model(tmp_path / "one"))))

    def version(gateway: dict[str, Any]) -> str:
        app = build_app(from_dict(ServeConfig, to_dict(served) | {"gateway": gateway}), check=False)
        directory = app._bound_deployment.init_args[0]
        return str(directory._bound_deployment._version)

    assert version({}) == version({"cors_origins": ["http://a.test"]})
    assert version({}) != version({"batches": {"max_attempts": 5}})
    assert version({}) != version({"files": {"tenant_bytes": 5 * 10**9}})


def test_a_model_of_the_hub_is_served_by_its_name_there(registry: Registry, hub: FakeHub, tmp_path: Path) -> None:
    folder = model(tmp_path / "tiny")
    hub.model("org/tiny", {p.name: p.read_bytes() for p in folder.iterdir()})
    (served,) = resolve_models(config(ServedModelConfig(model="org/tiny")), registry)
    assert (served.id, served.name, served.max_length) == ("org/tiny@1", "org/tiny", 64)
    assert Path(served.path) == registry.resolve("org/tiny").path
    # Serve makes file names of it.
    assert served.deployment == "engine-org~tiny"
    (again,) = resolve_models(config(ServedModelConfig(model="org/tiny@1", name="other")), registry)
    assert (again.id, again.name) == ("org/tiny@1", "other")


def test_a_name_that_is_neither_folder_nor_hub_model_is_refused_with_both_facts(
    registry: Registry, hub: FakeHub
) -> None:
    with pytest.raises(
        UnknownModelError, match=r"models: There is no folder org/tiny\. The hub .* has no model org/tiny"
    ):
        resolve_models(config(ServedModelConfig(model="org/tiny")), registry)
    hub.requests.clear()
    with pytest.raises(ConfigError, match=r"models: no model at .*/org/tiny: it has no config\.json"):
        resolve_models(config(ServedModelConfig(model="./org/tiny")), registry)
    with pytest.raises(ConfigError, match=r"models: no model at .*/a/b/c: it has no config\.json"):
        resolve_models(config(ServedModelConfig(model="a/b/c")), registry)
    assert not hub.requests


def test_each_model_is_resolved_once_per_deploy(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.register_model("one", model(tmp_path / "one"))
    asked: list[str] = []
    find = resolve_module.find_model
    monkeypatch.setattr(resolve_module, "find_model", lambda word, *more: asked.append(word) or find(word, *more))
    prepare(config(ServedModelConfig(model="one")), check=False)
    assert asked == ["one"]


def test_a_served_folder_has_the_models_length_or_that_of_its_engine(registry: Registry, tmp_path: Path) -> None:
    folder = model(tmp_path / "plain")
    plain = ServedModelConfig(model=str(folder))
    short = ServedModelConfig(model=str(folder), engine_args={"max_model_len": 32})
    assert [resolve_models(config(each), registry)[0].max_length for each in (plain, short)] == [64, 32]
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert resolve_models(config(plain), registry)[0].max_length is None


def test_the_engine_follows_from_the_model_and_the_config_still_says_auto(registry: Registry, tmp_path: Path) -> None:
    folder = model(tmp_path / "plain")
    app = resolve(config(ServedModelConfig(model=str(folder)), ServedModelConfig(model="x", name="x", engine="echo")))
    assert [each.config.engine for each in app.models] == ["vllm", "echo"]
    assert [each.engine for each in app.config.models] == ["auto", "echo"]
    (folder / "config.json").write_text(json.dumps({"architectures": ["LLaDAModelLM"]}))
    with pytest.raises(ConfigError, match=r"models\[0\]\.engine is auto, and no engine serves .*LLaDAModelLM"):
        resolve(config(ServedModelConfig(model=str(folder))))


def test_a_shape_without_kernels_for_cpus_is_refused_before_anything_starts(registry: Registry, tmp_path: Path) -> None:
    folder = model(tmp_path / "narrow")
    (folder / "config.json").write_text(json.dumps({"hidden_size": 64, "num_attention_heads": 4}))
    with pytest.raises(
        ConfigError, match=r"models\[0\]: narrow cannot be served\. Its attention heads have 16 dimensions"
    ):
        prepare(config(ServedModelConfig(model=str(folder))), check=False)
    prepare(config(ServedModelConfig(model=str(folder), gpus_per_replica=1.0)), check=False)
