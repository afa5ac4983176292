"""Registry of engines: a folder with a descriptor, and an entry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tandem.engine
from tandem.engine.engines import ENGINES, find_engine, select_engine
from tandem.engine.routes import ENGINE_ROUTES
from tandem.errors import ConfigError, RegistryError


def test_every_engine_folder_has_an_entry() -> None:
    folder = Path(tandem.engine.__path__[0])
    assert {each.parent.name for each in folder.glob("*/descriptor.py")} == set(ENGINES)


def test_an_unknown_engine_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        ConfigError, match=r"models\[\]\.engine is 'vlm'; it must be one of auto, vllm, echo\. Did you mean"
    ):
        find_engine("vlm")


@pytest.mark.parametrize("engine", ENGINES.values(), ids=lambda engine: engine.name)
def test_an_engines_routes_and_tasks_are_known_ones(engine) -> None:
    assert set(engine.routes) <= set(ENGINE_ROUTES)
    assert {route.task for route in engine.routes} - {None} <= set(engine.tasks)


def model(folder: Path, **config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_auto_selects_the_first_engine_that_serves_the_architecture(tmp_path: Path) -> None:
    assert select_engine("auto", model(tmp_path, architectures=["LlamaForCausalLM"])).name == "vllm"
    assert select_engine("echo", tmp_path / "no model").name == "echo"


def test_a_model_that_no_engine_serves_is_refused_with_its_architecture_and_the_engines(tmp_path: Path) -> None:
    folder = model(tmp_path, architectures=["LLaDAModelLM"])
    with pytest.raises(ConfigError, match=r"models\[0\]\.engine is auto.* LLaDAModelLM\. The engines are vllm, echo\."):
        select_engine("auto", folder, "models[0].engine")
    # By name it is the user's decision.
    assert select_engine("vllm", folder).name == "vllm"


def test_auto_for_a_folder_without_a_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"holds no config\.json"):
        select_engine("auto", tmp_path)
