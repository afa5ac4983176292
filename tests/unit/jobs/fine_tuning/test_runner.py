"""Ends of fine-tuning jobs whose training has finished: with the results file, or with the reason why there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from tandem.files.content import ContentStore, read_chunks
from tandem.files.store import FileStore
from tandem.jobs.client import JobClient
from tandem.jobs.dispatch.runner import RunState
from tandem.jobs.fine_tuning import FineTuningFolder, FineTuningSpec
from tandem.jobs.fine_tuning.runner import FineTuningRunner
from tandem.jobs.folder import JobState
from tandem.jobs.runners.ray import RayRunner


class FinishedJobs:
    """A cluster all of whose jobs have finished."""

    def known_state(self, handle: str) -> JobState:
        return JobState.FINISHED

    def log_lines(self, handle: str) -> list[str]:
        return []


@pytest.mark.parametrize(("tenant_bytes", "stored"), [(2**20, True), (0, False)])
def test_a_finished_job_ends_also_where_its_results_file_has_no_room(
    tandem_home: Path, tenant_bytes: int, stored: bool
) -> None:
    files = FileStore.open()
    spec = FineTuningSpec(
        id="ftjob-1",
        model="m",
        base="m@1",
        result="ft:m:red::1",
        tenant="red",
        training_file="f",
        training_location="x",
    )
    FineTuningFolder.create(spec)
    contents = ContentStore.open(files.identity or "", None)
    runner = FineTuningRunner(RayRunner(lambda: cast(JobClient, FinishedJobs())), files, contents, tenant_bytes)
    status = runner.state("ftjob-1.1")
    assert status is not None and status.state is RunState.FINISHED and status.result is not None
    result: dict[str, Any] = dict(status.result)
    if stored:
        (file,) = result["result_files"]
        assert b"step" in b"".join(read_chunks(files.get(file, "red").location))
        again, next_attempt = runner.state("ftjob-1.1"), runner.state("ftjob-1.2")
        assert again is not None and next_attempt is not None
        assert again.result == result and (next_attempt.result or {})["result_files"] != [file]
    else:
        assert result["result_files"] == [] and "was not stored" in result["notice"]
