"""Fine-tuning by the `openai` SDK alone: upload, train, follow, chat with a checkpoint and with the result."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError
from serve_fixtures import Served

COLOURS = ("red", "green", "blue", "white", "black", "brown")
TIMEOUT_S = 300.0


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def examples(count: int = 24) -> bytes:
    lines = [chat(f"colour {n}?", COLOURS[n % len(COLOURS)]) for n in range(count)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@pytest.fixture(scope="module")
def training_file(served: Served) -> str:
    client = served.client()
    file = client.files.create(file=("colours.jsonl", examples()), purpose="fine-tune")
    return str(client.files.wait_for_processing(file.id, poll_interval=0.5).id)


def wait_for(look: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(1.0)
    raise AssertionError(f"{what} did not happen within {TIMEOUT_S:g} s")


def test_a_fine_tune_answers_while_it_trains_and_after(served: Served, training_file: str) -> None:
    client = served.client()
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=training_file,
        suffix="colours",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 30, "batch_size": 8}}},
        metadata={"team": "paint"},
    )
    assert job.status in ("queued", "validating_files") and job.seed == 7 and job.fine_tuned_model is None

    def current() -> Any:
        found = client.fine_tuning.jobs.retrieve(job.id)
        assert found.status not in ("failed", "cancelled"), found.error
        return found

    def checkpoint() -> Any:
        current()
        return next(iter(client.fine_tuning.jobs.checkpoints.list(job.id).data), None)

    first = wait_for(checkpoint, "a checkpoint")
    assert first.fine_tuned_model_checkpoint.startswith("ft:tiny:default:colours:")
    answer = client.chat.completions.create(
        model=first.fine_tuned_model_checkpoint, messages=[{"role": "user", "content": "colour 0?"}], max_tokens=4
    )
    assert answer.model == first.fine_tuned_model_checkpoint and answer.usage.completion_tokens <= 4
    done = wait_for(lambda: (found := current()).status == "succeeded" and found, "the end")
    assert done.hyperparameters.n_epochs == 30 and done.trained_tokens > 0 and done.finished_at >= done.created_at
    assert client.chat.completions.create(
        model=done.fine_tuned_model, messages=[{"role": "user", "content": "colour 0?"}], max_tokens=4
    ).choices
    (result,) = done.result_files
    losses = [float(row["train_loss"]) for row in csv.DictReader(client.files.content(result).text.splitlines())]
    assert losses[-1] < losses[0]
    assert [found.id for found in client.fine_tuning.jobs.list(metadata={"team": "paint"})] == [job.id]


def test_events_come_in_pages_and_as_a_stream(served: Served, training_file: str) -> None:
    client = served.client()
    job = next(iter(client.fine_tuning.jobs.list()))
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "succeeded", "the end")
    newest = client.fine_tuning.jobs.list_events(job.id, limit=5)
    assert len(newest.data) == 5 and newest.has_more
    events = list(newest)  # the SDK asks for the other pages
    assert events[-1].message == f"Created fine-tuning job: {job.id}" and len({event.id for event in events}) == len(
        events
    )
    assert any(event.type == "metrics" and "train_loss" in event.data for event in events)
    with client.with_options(timeout=30)._client.stream(
        "GET", f"{served.url}/v1/fine_tuning/jobs/{job.id}/events", params={"stream": "true"}
    ) as stream:
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    assert [json.loads(line)["id"] for line in lines[:-1]] == [event.id for event in reversed(events)]


def test_a_job_is_paused_resumed_and_cancelled_and_frees_its_file(served: Served) -> None:
    client = served.client()
    file = client.files.create(file=("more.jsonl", examples(60)), purpose="fine-tune")
    client.files.wait_for_processing(file.id, poll_interval=0.5)
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50, "batch_size": 1}}}
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method=method)
    status = lambda: client.fine_tuning.jobs.retrieve(job.id).status  # noqa: E731
    wait_for(lambda: status() == "running", "the start")
    with pytest.raises(Exception, match="in use by"):
        client.files.delete(file.id)
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    client.fine_tuning.jobs.resume(job.id)
    wait_for(lambda: status() == "running", "the second start")
    client.fine_tuning.jobs.cancel(job.id)
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).finished_at, "the end")
    assert status() == "cancelled"

    def deleted() -> bool:
        try:
            return bool(client.files.delete(file.id).deleted)
        except Exception as error:
            assert "in use by" in str(error)
            return False

    wait_for(deleted, "the release of the file")


def test_a_file_that_cannot_be_trained_on_fails_the_job_with_the_line(served: Served) -> None:
    client = served.client()
    broken = (
        examples(3)
        + json.dumps(chat("a", "")).encode()
        + b"\n"
        + b'{"messages": [{"role": "robot", "content": "x"}]}\n'
    )
    file = client.files.create(file=("broken.jsonl", broken), purpose="fine-tune")
    processed = client.files.wait_for_processing(file.id, poll_interval=0.5)
    assert processed.status == "error" and "Line 5" in str(processed.status_details)
    with pytest.raises(BadRequestError, match="Line 5"):
        client.fine_tuning.jobs.create(model="tiny", training_file=file.id)


def test_wrong_requests_are_refused_before_a_job_is_made(served: Served, training_file: str) -> None:
    client = served.client()
    jobs = client.fine_tuning.jobs
    before = len(list(jobs.list()))
    other = client.files.create(file=("x.jsonl", b"{}\n"), purpose="user_data")
    with pytest.raises(NotFoundError):
        jobs.create(model="no-such-model", training_file=training_file)
    for wrong, message in (
        ({"training_file": "file-none"}, "training_file"),
        ({"training_file": other.id}, "purpose user_data; it must be fine-tune"),
        ({"model": "red"}, "red is an adapter of tiny"),
        ({"suffix": "a/b"}, "suffix"),
        ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 10**6}}}}, "allows 50"),
    ):
        with pytest.raises(BadRequestError, match=message):
            jobs.create(**{"model": "tiny", "training_file": training_file, **wrong})
    with pytest.raises(NotFoundError):
        jobs.retrieve("ftjob-none")
    assert len(list(jobs.list())) == before


def test_the_same_idempotency_key_makes_one_job(served: Served, training_file: str) -> None:
    client = served.client()
    options = {"model": "tiny", "training_file": training_file, "extra_headers": {"Idempotency-Key": "once"}}
    first, second = (client.fine_tuning.jobs.create(**options) for _ in range(2))
    other = client.fine_tuning.jobs.create(model="tiny", training_file=training_file)
    assert first.id == second.id != other.id
    for job in (first, other):
        client.fine_tuning.jobs.cancel(job.id)
