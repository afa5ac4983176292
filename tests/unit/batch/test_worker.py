"""What a worker says of what it cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tandem.batch.answer import EngineClient
from tandem.batch.models import BaseModel, ResolvedModel
from tandem.batch.output.write import Output
from tandem.batch.work import WorkerContext
from tandem.batch.worker import Worker
from tandem.cluster.reaper import Reaper
from tandem.config import ServedModelConfig
from tandem.engine.spec import EngineSpec
from tandem.errors import EngineError, StorageError


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkerContext:
    # One would position whatever the tests start after it.
    monkeypatch.setattr(Reaper, "of_children", lambda: None)
    return WorkerContext(
        spec=EngineSpec(kind="echo", id="echo", name="echo", path=""),
        served=ServedModelConfig(model="echo", engine="echo"),
        default=ResolvedModel(BaseModel(id="echo", name="echo", path="")),
        targets={},
        request={},
        output=Output.at(str(tmp_path / "out")),
        window_rows=4,
    )


def test_a_worker_on_a_node_without_the_output_says_so_before_it_answers_anything(work: WorkerContext) -> None:
    with pytest.raises(EngineError, match=r"out/run is not on the node .* all nodes share, or s3://"):
        Worker(work)


def test_a_store_that_stays_away_ends_the_run_in_its_own_words(
    work: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> None:
        raise ExceptionGroup("of many rows", [StorageError("s3://b/red cannot be read"), StorageError("nor this")])

    monkeypatch.setattr(EngineClient, "answer", away)
    work.output.begin({})
    worker = Worker(work)
    try:
        with pytest.raises(StorageError, match="s3://b/red cannot be read"):
            worker._answer([(0, "line 1", b'{"prompt": "a"}')])
    finally:
        worker._client.close()
