"""After a save is killed at any point, the newest listed checkpoint is complete, and the next run can save."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from killed_saves import POINTS, Weights

from tandem.checkpoint import folders
from tandem.checkpoint.folders import SavedState
from tandem.checkpoint.sharded import Checkpoints
from tandem.settings import child_environment

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what each killed process left."""
    folder = tmp_path_factory.mktemp("killed")
    script = str(Path(__file__).with_name("killed_saves.py"))
    environment = child_environment({"OMP_NUM_THREADS": "1"})
    done = subprocess.run(
        [sys.executable, script, str(folder)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "background"])
@pytest.mark.parametrize("point", POINTS)
def test_a_killed_save_is_complete_or_absent(killed: Path, point: str, asynchronous: bool):
    root = killed / f"{point} {asynchronous}"
    committed = 2 if point == "it has its name" else 1
    assert [folders.step_of(found) for found in folders.list_complete(root)] == list(range(1, committed + 1))
    checkpoints, weights = Checkpoints(root, keep=2), Weights(-1.0)
    state, said = checkpoints.load(weights, None)  # type: ignore[arg-type]
    assert state is not None and state.step == committed and not said
    assert {float(value) for held in weights.held.values() for value in held.unique()} == {float(committed)}
    checkpoints.save(Weights(3.0), None, SavedState(step=3, tokens=3, loss=None, world=1))  # type: ignore[arg-type]
    checkpoints.wait()
    assert sorted(found.name for found in root.iterdir()) == [f"step-{committed:08d}", "step-00000003"]
