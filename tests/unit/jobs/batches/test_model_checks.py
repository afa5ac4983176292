"""Models of a batch: its requests are queued when gateways have found all of its models usable, and not before."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from tandem.files.content import ContentStore
from tandem.files.store import FileStore
from tandem.jobs.batches import model_checks
from tandem.jobs.batches.model_checks import ModelChecks, ModelQuestion, Refusal
from tandem.jobs.batches.runner import BatchRunner
from tandem.jobs.batches.stored import RUNNER
from tandem.jobs.dispatch.runner import RunState
from tandem.jobs.work.clock import ManualClock
from tandem.jobs.work.queue import ItemQueue
from tandem.jobs.work.records import Job, JobSubmission
from tandem.jobs.work.states import JobKind
from tandem.jobs.work.store import JobStore

DEADLINE_S = 120.0
UNKNOWN = Refusal("model_not_found", "There is none.")


@pytest.fixture
def checks(url: str, clock: ManualClock) -> Iterator[ModelChecks]:
    with ModelChecks(url, clock=clock) as checks:
        yield checks


@pytest.fixture
def submit(url: str, clock: ManualClock) -> Iterator[Callable[[str], Job]]:
    """Submits a batch whose input is at a location."""
    with JobStore(url, clock=clock) as store:

        def run(location: str) -> Job:
            spec = {"type": "openai_batch", "endpoint": "/v1/completions", "location": location, "models": ["a", "b"]}
            submission = JobSubmission(
                kind=JobKind.BATCH, name="b", spec=spec, tenant="red", key_id="key-1", runner=RUNNER
            )
            job = store.claim(store.submit(submission).job.id, "dispatcher", 3600.0)
            assert job is not None
            return job

        yield run


def question(checks: ModelChecks, model: str) -> ModelQuestion:
    (found,) = [each for each in checks.unanswered() if each.model == model]
    return found


def test_a_gateway_learns_all_that_decides_whether_a_model_can_be_used(
    checks: ModelChecks, submit: Callable[[str], Job]
) -> None:
    job = submit("in.jsonl")
    checks.ask(job.id, ["a"])
    checks.ask(job.id, ["a"])
    assert checks.unanswered() == [ModelQuestion(job.id, "a", "/v1/completions", "red", "key-1", ("a", "b"))]


def test_models_are_usable_when_a_gateway_has_found_each_of_them_so(
    checks: ModelChecks, submit: Callable[[str], Job]
) -> None:
    job, other = submit("in.jsonl"), submit("other.jsonl")
    checks.ask(job.id, ["a", "b"])
    checks.ask(other.id, ["c"])
    assert checks.refusals(job.id) is None
    checks.answer(question(checks, "a"), None)
    assert checks.refusals(job.id) is None
    checks.answer(question(checks, "b"), None)
    assert checks.refusals(job.id) == {}
    assert [each.model for each in checks.unanswered()] == ["c"]
    checks.forget(other.id)
    assert checks.unanswered() == []


def test_a_model_that_only_another_app_serves_is_usable(
    checks: ModelChecks, submit: Callable[[str], Job], clock: ManualClock
) -> None:
    job = submit("in.jsonl")
    checks.ask(job.id, ["a"])
    asked = question(checks, "a")
    checks.answer(asked, UNKNOWN)
    assert checks.refusals(job.id) is None, "gateways of other apps have had no time to answer"
    checks.answer(asked, None)
    checks.answer(asked, UNKNOWN)
    clock.advance(model_checks.SETTLE.total_seconds() + 1)
    assert checks.refusals(job.id) == {}


def test_a_model_that_no_gateway_serves_is_refused_after_a_while_for_the_first_reason(
    checks: ModelChecks, submit: Callable[[str], Job], clock: ManualClock
) -> None:
    job = submit("in.jsonl")
    checks.ask(job.id, ["a", "b"])
    checks.answer(question(checks, "a"), UNKNOWN)
    checks.answer(question(checks, "a"), Refusal("other", "A second opinion."))
    checks.answer(question(checks, "b"), None)
    clock.advance(model_checks.SETTLE.total_seconds() + 1)
    assert checks.refusals(job.id) == {"a": UNKNOWN}


def test_a_batch_that_names_a_model_that_cannot_be_used_fails_with_its_first_line_and_queues_nothing(
    checks: ModelChecks, submit: Callable[[str], Job], url: str, clock: ManualClock, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(model_checks, "SETTLE", timedelta(0))
    names = ("good", "good", "bad", "bad")
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": {"model": name, "prompt": "p"}}
        for n, name in enumerate(names)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = submit(str(tmp_path / "in.jsonl"))
    with JobStore(url, clock=clock) as store, ItemQueue(url, clock=clock) as queue, FileStore(url) as files:
        contents = ContentStore(tmp_path)
        runner = BatchRunner(store, queue, checks, files, contents, tenant_bytes=2**30, max_attempts=3)
        runner.start(job)
        deadline = time.monotonic() + DEADLINE_S
        while len(checks.unanswered()) < 2:
            assert time.monotonic() < deadline, "nothing was asked"
            time.sleep(0.02)
        assert not queue.counts(job.id)
        checks.answer(question(checks, "good"), None)
        checks.answer(question(checks, "bad"), UNKNOWN)
        while (status := runner.state(job.run_name)) is None or status.state is RunState.RUNNING:
            assert time.monotonic() < deadline, "it still runs"
            time.sleep(0.02)
        assert not queue.counts(job.id)
    assert status.state is RunState.FAILED and not status.retryable and status.result is not None
    (error,) = status.result["errors"]["data"]
    assert (error["code"], error["line"], error["param"]) == ("model_not_found", 3, "body.model")
    assert checks.unanswered() == []
