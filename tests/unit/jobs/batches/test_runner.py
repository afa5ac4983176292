"""Runs of batches: the file is checked, its requests queued, and the output written when all have ended."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from postgresql import Server

from tandem.db.database import open_database
from tandem.errors import RegistryUnreachableError
from tandem.files.content import ContentStore, read_chunks
from tandem.files.outputs import write_output
from tandem.files.records import Purpose
from tandem.files.store import FileStore
from tandem.jobs.batches import runner as module
from tandem.jobs.batches.answers import SegmentWriter, output_line
from tandem.jobs.batches.model_checks import ModelChecks
from tandem.jobs.batches.runner import BatchRunner
from tandem.jobs.batches.stored import QUEUE, RUNNER, answers_folder
from tandem.jobs.batches.view import batch_to_wire
from tandem.jobs.dispatch.decisions import Capacity
from tandem.jobs.dispatch.dispatcher import Dispatcher
from tandem.jobs.dispatch.runner import RunState, RunStatus
from tandem.jobs.work.queue import ItemQueue
from tandem.jobs.work.records import Answer, Job, JobSubmission
from tandem.jobs.work.states import JobKind, State
from tandem.jobs.work.store import JobStore
from tandem.observability.events import RequestsQueued

DEADLINE_S = 300.0


@pytest.fixture(autouse=True)
def usable_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model can be used: `test_model_checks` has the questions."""
    monkeypatch.setattr(ModelChecks, "refusals", lambda self, job: {})


@pytest.fixture
def store(tandem_home: Path, monkeypatch: pytest.MonkeyPatch) -> JobStore:
    for name in ("POLL_S", "PAUSE_S", "QUOTA_PAUSE_S"):
        monkeypatch.setattr(module, name, 0.02)
    return JobStore.open()


@pytest.fixture
def files(store: JobStore) -> FileStore:
    return FileStore.open()


@pytest.fixture
def runner(store: JobStore, files: FileStore) -> BatchRunner:
    contents = ContentStore.open(store.identity, None)
    return BatchRunner(store, ItemQueue.open(), ModelChecks.open(), files, contents, tenant_bytes=2**30, max_attempts=3)


def start(store: JobStore, runner: BatchRunner, path: Path, lines: list[dict[str, Any]]) -> Job:
    """A batch that runs, as a dispatcher starts it."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = {"endpoint": "/v1/completions", "location": str(path), "input_file_id": "file-1"}
    job = store.submit(JobSubmission(kind=JobKind.BATCH, name="b", spec=spec, tenant="red", runner=RUNNER)).job
    claimed = store.claim(job.id, "dispatcher", 60.0)
    assert claimed is not None and claimed.lease is not None
    return store.started(claimed.lease, runner.start(claimed))


def request(number: int) -> dict[str, Any]:
    body = {"model": "m", "prompt": "p"}
    return {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/completions", "body": body}


def answer(job: Job, count: int, queue: ItemQueue | None = None) -> None:
    """Answer some requests, as a gateway does."""
    queue, segment = queue or ItemQueue.open(), SegmentWriter(answers_folder(job.id))
    while not (items := queue.claim(QUEUE, "gateway", 60.0, limit=count)):
        time.sleep(0.02)
    places = segment.append([output_line(i.id, str((i.payload or {})["custom_id"]), 200, "r", b"{}") for i in items])
    queue.report(
        [Answer(lease=i.lease, result_reference=str(p)) for i, p in zip(items, places, strict=True) if i.lease]
    )


def ended(runner: BatchRunner, job: Job) -> RunStatus:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        status = runner.state(job.run_name)
        assert status is not None
        if status.state is not RunState.RUNNING:
            return status
        time.sleep(0.02)
    raise AssertionError("it still runs")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def is_queued(store: JobStore, job: Job) -> bool:
    """Whether all requests of a batch are in the queue, and that is recorded."""
    return any(isinstance(numbered.event, RequestsQueued) for numbered in store.events(job.id))


def shown_status(store: JobStore, job: Job) -> str:
    """As the API shows it."""
    return batch_to_wire(store.get(job.id), ItemQueue.open().counts(job.id), store.events(job.id)).status


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


def test_a_cancelled_batch_that_runs_again_has_an_output_of_all_answers(
    store: JobStore, files: FileStore, runner: BatchRunner, tmp_path: Path
) -> None:
    job = start(store, runner, tmp_path / "in.jsonl", [request(n) for n in range(4)])
    answer(job, 2)
    cancelled = store.cancel(job.id)
    runner.stop(cancelled)
    status = ended(runner, job)
    assert cancelled.lease is not None and status.result is not None
    partial = status.result["output_file_id"]
    store.stopped(cancelled.lease, status.result)
    store.requeue(job.id)
    again = store.claim(job.id, "dispatcher", 60.0)
    assert again is not None and again.lease is not None
    store.started(again.lease, runner.start(again))
    answer(job, 2)
    status = ended(runner, again)
    assert (status.state, status.error) == (RunState.FINISHED, None) and status.result is not None
    assert ids(files, partial) == ["id-0", "id-1"]
    assert ids(files, status.result["output_file_id"]) == [f"id-{n}" for n in range(4)]


def test_a_batch_that_is_paused_writes_no_output(store: JobStore, runner: BatchRunner, tmp_path: Path) -> None:
    job = start(store, runner, tmp_path / "in.jsonl", [request(0)])
    runner.stop(replace(job, state=State.PAUSING))
    assert ended(runner, job) == RunStatus(state=RunState.STOPPED)


def test_a_run_of_a_dispatcher_that_died_goes_on_and_queues_nothing_twice(
    store: JobStore, files: FileStore, runner: BatchRunner, tmp_path: Path
) -> None:
    job = start(store, runner, tmp_path / "in.jsonl", [request(n) for n in range(5)])
    answer(job, 3)
    until(lambda: is_queued(store, job))
    # What was checked is not read again.
    (tmp_path / "in.jsonl").write_text("changed")
    contents = ContentStore.open(store.identity, None)
    other = BatchRunner(
        store, ItemQueue.open(), ModelChecks.open(), files, contents, tenant_bytes=2**30, max_attempts=3
    )
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


def test_a_file_that_could_not_be_checked_is_checked_again(
    store: JobStore, runner: BatchRunner, tmp_path: Path
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("")
    spec = {"endpoint": "/v1/completions", "location": str(path)}
    job = store.submit(JobSubmission(kind=JobKind.BATCH, name="b", spec=spec, runner=RUNNER)).job
    path.unlink()
    claimed = store.claim(job.id, "dispatcher", 60.0)
    assert claimed is not None
    runner.start(claimed)
    status = ended(runner, claimed)
    assert status.state is RunState.FAILED and status.retryable and "is gone" in (status.error or "")


def test_a_batch_outlives_a_database_that_is_away(
    tandem_home: Path, postgresql_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("POLL_S", "PAUSE_S", "QUOTA_PAUSE_S"):
        monkeypatch.setattr(module, name, 0.02)
    url = postgresql_server.create(uuid.uuid4().hex)
    open_database(url, create=True).dispose()
    store, queue, files = JobStore(url), ItemQueue(url), FileStore(url)
    runner = BatchRunner(
        store, queue, ModelChecks(url), files, ContentStore(tmp_path), tenant_bytes=2**30, max_attempts=3
    )
    job = start(store, runner, tmp_path / "in.jsonl", [request(n) for n in range(2)])
    until(lambda: is_queued(store, job))
    postgresql_server.stop()
    try:
        with pytest.raises(RegistryUnreachableError):
            until(lambda: (found := runner.state(job.run_name)) is None or found.state is not RunState.RUNNING)
    finally:
        postgresql_server.start()
    answer(job, 2, queue)
    status = ended(runner, job)
    assert status.state is RunState.FINISHED and status.result is not None and status.result["completed"] == 2
    for each in (store, queue, files):
        each.close()


def test_an_output_that_cannot_be_written_now_is_written_later(
    store: JobStore, files: FileStore, runner: BatchRunner, tmp_path: Path
) -> None:
    job = start(store, runner, tmp_path / "in.jsonl", [request(n) for n in range(2)])
    answer(job, 2)
    until(lambda: is_queued(store, job))
    away = answers_folder(job.id).rename(tmp_path / "away")
    for _ in range(20):
        status = runner.state(job.run_name)
        assert status is not None and status.state is RunState.RUNNING
        time.sleep(0.02)
    away.rename(answers_folder(job.id))
    assert ended(runner, job).state is RunState.FINISHED


def test_an_output_beyond_the_files_quota_waits_for_room_and_says_so(
    store: JobStore, files: FileStore, tmp_path: Path
) -> None:
    contents = ContentStore.open(store.identity, None)
    runner = BatchRunner(
        store, ItemQueue.open(), ModelChecks.open(), files, contents, tenant_bytes=1000, max_attempts=3
    )
    large = write_output(
        files, contents, [b"x" * 990], tenant="red", purpose=Purpose.USER_DATA, filename="large", quota_bytes=1000
    )
    job = start(store, runner, tmp_path / "in.jsonl", [request(n) for n in range(2)])
    assert shown_status(store, job) == "in_progress"
    answer(job, 2)

    def waits() -> bool:
        status = runner.state(job.run_name)
        assert status is not None and status.state is RunState.RUNNING
        return "1,000" in (store.get(job.id).reason or "")

    until(waits)
    assert shown_status(store, job) == "finalizing"
    files.delete(large.id, "red")
    assert ended(runner, job).state is RunState.FINISHED


def test_a_batch_that_is_cancelled_while_its_file_is_checked_queues_nothing(
    store: JobStore, runner: BatchRunner, tmp_path: Path
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(request(0)) + "\n")
    spec = {"endpoint": "/v1/completions", "location": str(path)}
    job = store.submit(JobSubmission(kind=JobKind.BATCH, name="b", spec=spec, tenant="red", runner=RUNNER)).job
    claimed = store.claim(job.id, "dispatcher", 60.0)
    assert claimed is not None and claimed.lease is not None
    cancelled = store.cancel(job.id)
    # Its run has begun, and is told later.
    runner.start(claimed)
    time.sleep(0.3)
    for _ in range(20):
        status = runner.state(claimed.run_name)
        assert status is not None and status.state is RunState.RUNNING
        time.sleep(0.02)
    runner.stop(cancelled)
    assert ended(runner, claimed).state is RunState.STOPPED
    assert ItemQueue.open().counts(job.id) == {}


def test_a_paused_batch_that_is_cancelled_has_an_output_of_what_was_answered(
    store: JobStore, files: FileStore, runner: BatchRunner, tmp_path: Path
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(request(n)) + "\n" for n in range(3)))
    spec = {"endpoint": "/v1/completions", "location": str(path), "input_file_id": "file-1"}
    job = store.submit(JobSubmission(kind=JobKind.BATCH, name="b", spec=spec, tenant="red", runner=RUNNER)).job
    dispatcher = Dispatcher(store, {RUNNER: runner}, lambda: Capacity(cpus=1.0))

    def rounds_until(state: State) -> None:
        until(lambda: dispatcher.round() and store.get(job.id).state is state)

    rounds_until(State.RUNNING)
    answer(job, 1)
    store.pause(job.id)
    rounds_until(State.PAUSED)
    assert store.cancel(job.id).state is State.STOPPING
    rounds_until(State.CANCELLED)
    result = store.get(job.id).result
    assert result is not None and (result["completed"], result["failed"]) == (1, 2)
    assert ids(files, result["output_file_id"]) == ["id-0"]
    shown = batch_to_wire(store.get(job.id), {}, store.events(job.id)).request_counts
    assert (shown.total, shown.completed, shown.failed) == (3, 1, 2), "an ended batch tells its numbers without a count"
    dispatcher.close()


def test_a_batch_that_is_cancelled_while_it_pauses_has_an_output(
    store: JobStore, runner: BatchRunner, tmp_path: Path
) -> None:
    job = start(store, runner, tmp_path / "in.jsonl", [request(n) for n in range(2)])
    answer(job, 1)
    runner.stop(store.pause(job.id))
    store.cancel(job.id)
    status = ended(runner, job)
    assert status.state is RunState.STOPPED and status.result is not None and status.result["completed"] == 1


def test_few_batches_are_checked_at_once(
    store: JobStore, runner: BatchRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEPS_AT_ONCE", 1)
    jobs = [start(store, runner, tmp_path / f"{number}.jsonl", [request(0)]) for number in range(3)]
    names = {job.run_name for job in jobs}
    assert sum(thread.name in names for thread in threading.enumerate()) <= module.STEPS_AT_ONCE

    def all_queued() -> bool:
        for job in jobs:
            runner.state(job.run_name)
        return all(is_queued(store, job) for job in jobs)

    until(all_queued)
