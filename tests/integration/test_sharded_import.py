"""Each rank loads only its slices of a base model, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from import_world import LAYOUTS
from worlds import result, run_worlds


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what two processes gave for every case of import_world.py."""
    return run_worlds("import_world.py", tmp_path_factory.mktemp("import"), sizes=(2,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_loads_its_part_of_the_base(world: Path, layout: str):
    for rank in (0, 1):
        found = result(world, 2, layout, rank)
        assert found.pop("elements") < 0.75
        assert found == {"same": True, "rotary": True, "trained": True, "checked": True}


@pytest.mark.parametrize("rank", [0, 1])
def test_sharded_loading_takes_the_memory_of_one_ranks_part(world: Path, rank: int):
    found = result(world, 2, "memory", rank)
    assert found["slices"] < 0.75 * found["model"] < found["model"] < found["whole"]


def test_a_base_loaded_in_slices_is_exported_by_all_ranks(world: Path):
    from safetensors.torch import load_file

    def tensors(folder: Path) -> dict[str, object]:
        return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}

    first, again = tensors(world / "bases" / "moe"), tensors(world / "again")
    assert first.keys() == again.keys() and all((first[name] == again[name]).all() for name in first)


def test_dora_loads_the_whole_base_for_its_magnitudes(world: Path):
    assert result(world, 2, "dora") == {"reads all": True}
