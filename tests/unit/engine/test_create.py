"""Creation of engines: environment and files."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_hub import FakeHub

from tandem.engine.create import create_engine
from tandem.engine.spec import EngineSpec
from tandem.engine.vllm.environment import engine_environment
from tandem.registry import HubModel, Registry, pull_model


@pytest.mark.parametrize("gpus", [0.0, 1.0])
def test_the_engine_environment_sets_no_hub_variables(gpus: float) -> None:
    environment = engine_environment(EngineSpec(kind="vllm", id="m@1", name="m", path="/m", gpus=gpus))
    assert not [name for name in environment if name.startswith(("HF_", "TRANSFORMERS_"))]


def test_an_engine_on_a_node_without_the_files_downloads_them_first(hub: FakeHub, tandem_home: Path) -> None:
    hub.model("org/tiny", {"config.json": b"{}", "model.safetensors": b"x"})
    record = pull_model(HubModel(repo="org/tiny"), Registry.open())
    (tandem_home / "cache").rename(tandem_home / "gone")
    create_engine(EngineSpec(kind="echo", id=record.id, name=record.name, path=str(record.path)))
    assert (record.path / "model.safetensors").read_bytes() == b"x"
