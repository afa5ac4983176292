"""Runs of batches: the file is checked, its requests queued, and the output written when all have ended."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tandem.files.content import ContentStore, read_chunks
from tandem.files.store import FileStore
from tandem.jobs.batches import runner as module
from tandem.jobs.batches.answers import SegmentWriter, output_line
from tandem.jobs.batches.runner import BatchRunner
from tandem.jobs.batches.stored import QUEUE, RUNNER, answers_folder
from tandem.jobs.dispatch.runner import RunState, RunStatus
from tandem.jobs.work.queue import ItemQueue
from tandem.jobs.work.records import Answer, Job, JobSubmission
from tandem.jobs.work.states import JobKind, State
from tandem.jobs.work.store import JobStore


@pytest.fixture
def store(tandem_home: Path, monkeypatch: pytest.MonkeyPatch) -> JobStore:
    monkeypatch.setattr(module, "POLL_S", 0.02)
    return JobStore.open()


@pytest.fixture
def files(store: JobStore) -> FileStore:
    return FileStore.open()


@pytest.fixture
def runner(store: JobStore, files: FileStore) -> BatchRunner:
    contents = ContentStore.open(store.identity, None)
    return BatchRunner(store, ItemQueue.open(), files, contents, tenant_bytes=2**30, max_attempts=3)


def start(store: JobStore, runner: BatchRunner, path: Path, lines: list[dict[str, Any]]) -> Job:
    """A batch that runs, as a dispatcher starts it."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = {"endpoint": "/v1/completions", "location": str(path)}
    job = store.submit(JobSubmission(kind=JobKind.BATCH, name="b", spec=spec, tenant="red", runner=RUNNER)).job
    claimed = store.claim(job.id, "dispatcher", 60.0)
    assert claimed is not None and claimed.lease is not None
    return store.started(claimed.lease, runner.start(claimed))


def request(number: int) -> dict[str, Any]:
    body = {"model": "m", "prompt": "p"}
    return {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/completions", "body": body}


def answer(job: Job, count: int) -> None:
    """Answer some requests, as a gateway does."""
    queue, segment = ItemQueue.open(), SegmentWriter(answers_folder(job.id))
    while not (items := queue.claim(QUEUE, "gateway", 60.0, limit=count)):
        time.sleep(0.02)
    places = segment.append([output_line(i.id, str((i.payload or {})["custom_id"]), 200, "r", {}) for i in items])
    queue.report(
        [Answer(lease=i.lease, result_reference=str(p)) for i, p in zip(items, places, strict=True) if i.lease]
    )


def ended(runner: BatchRunner, job: Job) -> RunStatus:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        status = runner.state(job.run_name)
        assert status is not None
        if status.state is not RunState.RUNNING:
            return status
        time.sleep(0.02)
    raise AssertionError("it still runs")


def ids(files: FileStore, file: str | None) -> list[str]:
    assert file is not None
    content = b"".join(read_chunks(files.get(file, "red").location))
    return [json.loads(line)["custom_id"] for line in content.splitlines()]


def test_a_batch_whose_requests_have_ended_is_finished_with_its_output(
    store: JobStore, files: FileStore, runner: BatchRunner, tmp_path: Path
) -> None:
    job = start(store, runner, tmp_path / "in.jsonl", [request(n) for n in range(5)])
    answer(job, 5)
    status = ended(runner, job)
    assert status.state is RunState.FINISHED and status.result is not None
    assert ids(files, status.result["output_file_id"]) == [f"id-{n}" for n in range(5)]
    assert status.result["error_file_id"] is None


@pytest.mark.parametrize("wait_s", [0.0, 0.3])
def test_a_cancelled_batch_is_stopped_and_never_finished(
    store: JobStore, files: FileStore, runner: BatchRunner, tmp_path: Path, wait_s: float
) -> None:
    job = start(store, runner, tmp_path / "in.jsonl", [request(n) for n in range(5)])
    answer(job, 2)
    cancelled = store.cancel(job.id)
    assert cancelled.state is State.STOPPING
    # Its requests have all ended at once; the dispatcher tells its run later.
    time.sleep(wait_s)
    runner.stop(cancelled)
    status = ended(runner, job)
    assert status.state is RunState.STOPPED and status.result is not None
    assert (status.result["completed"], status.result["failed"]) == (2, 3)
    assert ids(files, status.result["error_file_id"]) == ["id-2", "id-3", "id-4"]


def test_a_batch_that_is_paused_writes_no_output(store: JobStore, runner: BatchRunner, tmp_path: Path) -> None:
    job = start(store, runner, tmp_path / "in.jsonl", [request(0)])
    runner.stop(replace(job, state=State.PAUSING))
    assert ended(runner, job) == RunStatus(state=RunState.STOPPED)


def test_a_run_of_a_dispatcher_that_died_goes_on_and_queues_nothing_twice(
    store: JobStore, files: FileStore, runner: BatchRunner, tmp_path: Path
) -> None:
    job = start(store, runner, tmp_path / "in.jsonl", [request(n) for n in range(5)])
    answer(job, 3)
    contents = ContentStore.open(store.identity, None)
    other = BatchRunner(store, ItemQueue.open(), files, contents, tenant_bytes=2**30, max_attempts=3)
    assert other.state(job.run_name) is not None
    answer(job, 5)
    status = ended(other, job)
    assert status.state is RunState.FINISHED and status.result is not None and status.result["completed"] == 5


def test_a_file_with_a_wrong_line_fails_the_batch_before_a_request_is_queued(
    store: JobStore, runner: BatchRunner, tmp_path: Path
) -> None:
    job = start(store, runner, tmp_path / "in.jsonl", [request(0), {**request(1), "method": "GET"}])
    status = ended(runner, job)
    assert status.state is RunState.FAILED and not status.retryable and status.result is not None
    assert status.result["errors"]["data"][0]["line"] == 2
    assert ItemQueue.open().counts(job.id) == {}
