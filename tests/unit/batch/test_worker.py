"""What a worker sees to before it loads a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.batch.models import BaseModel, Target
from tandem.batch.work import Work
from tandem.batch.worker import Worker
from tandem.batch.write import Output
from tandem.engine.spec import EngineSpec
from tandem.errors import EngineError


def test_a_worker_on_a_node_without_the_output_says_so_before_it_answers_anything(tmp_path: Path) -> None:
    work = Work(
        spec=EngineSpec(id="echo", name="echo", kind="echo", path=""),
        default=Target(BaseModel(id="echo", name="echo", path="")),
        targets={},
        request={},
        output=Output.at(str(tmp_path / "out")),
        window_rows=4,
    )
    with pytest.raises(EngineError, match=r"out/run is not on the node .* all nodes share, or s3://"):
        Worker(work)
