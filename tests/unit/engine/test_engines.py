"""Registry of engines: a folder with a descriptor, and an entry."""

from __future__ import annotations

from pathlib import Path

import pytest

import tandem.engine
from tandem.engine.engines import ENGINES, find_engine
from tandem.engine.routes import ENGINE_ROUTES
from tandem.errors import ConfigError


def test_every_engine_folder_has_an_entry() -> None:
    folder = Path(tandem.engine.__path__[0])
    assert {each.parent.name for each in folder.glob("*/descriptor.py")} == set(ENGINES)


def test_an_unknown_engine_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"models\[\]\.engine is 'vlm'; it must be one of vllm, echo\. Did you mean"):
        find_engine("vlm")


@pytest.mark.parametrize("engine", ENGINES.values(), ids=lambda engine: engine.name)
def test_an_engines_routes_and_tasks_are_known_ones(engine) -> None:
    assert set(engine.routes) <= set(ENGINE_ROUTES)
    assert {route.task for route in engine.routes} - {None} <= set(engine.tasks)
