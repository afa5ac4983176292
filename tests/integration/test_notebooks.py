"""The notebooks run as they are, from their first cell to their last; only how long they train is changed."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from commands import REPOSITORY
from nbclient import NotebookClient

from tandem.cluster.local import LocalCluster
from tandem.cluster.ports import free_ports

SHORT = """PRETRAIN = ["steps=4", "checkpoint.every_steps=0"]
FINE_TUNE = ["steps=4", "checkpoint.every_steps=0"]
PORT = {port}"""


@pytest.mark.slow  # a notebook trains and serves
@pytest.mark.timeout(900)
def test_the_quickstart_notebook_runs(cluster: LocalCluster, session_home: Path) -> None:
    notebook = nbformat.read(REPOSITORY / "notebooks" / "01_quickstart.ipynb", as_version=4)
    parameters = next(cell for cell in notebook.cells if "PRETRAIN = []" in cell.source)
    parameters.source = SHORT.format(port=free_ports(1)[0])
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(REPOSITORY))
    answers = next(cell for cell in notebook.cells if "stream=True" in cell.source)
    said = "".join(output.get("text", "") for output in answers.outputs)
    assert "quickstart-base@1: " in said
    assert "quickstart@1: " in said
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 1
