"""What is read of a run's journal while it grows: its progress, and the events that a client follows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.api.openai.fine_tuning import FineTuningCreation, FineTuningEvent
from tandem.config.serving.fine_tuning import FineTuningConfig
from tandem.files.store import FileStore
from tandem.jobs.fine_tuning import progress as module
from tandem.jobs.fine_tuning.feed import FineTuningFeed
from tandem.jobs.fine_tuning.progress import ProgressReader
from tandem.jobs.fine_tuning.service import Base, FineTuningService
from tandem.jobs.work.store import JobStore
from tandem.observability.events import FineTuningPlanned, Notice, Step
from tandem.observability.journal import Journal
from tandem.settings import settings

PLANNED = FineTuningPlanned(examples=10, steps=4, n_epochs=1, batch_size=2, learning_rate_multiplier=1.0)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "events.jsonl", prints=False)


def step(number: int) -> Step:
    return Step(step=number, steps=4, loss=1.0 / number)


def test_the_progress_follows_what_is_appended(journal: Journal) -> None:
    reader = ProgressReader()
    assert reader.read(journal.path).planned is None
    for event in (PLANNED, step(1), Notice(message="slow")):
        journal.write(event)
    progress = reader.read(journal.path)
    assert progress.planned is not None and progress.planned.examples == 10
    assert progress.first_step == progress.last_step and progress.last_step is not None
    journal.write(step(2))
    with journal.path.open("a") as file:
        file.write('{"time": 1.0, "event": "step", "st')  # a line that is being written
    progress = reader.read(journal.path)
    assert progress.first_step is not None and progress.last_step is not None
    assert (progress.first_step.step, progress.last_step.step) == (1, 2)
    assert progress == ProgressReader().read(journal.path)


def test_what_was_read_is_not_read_again(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, read = ProgressReader(), []
    lines_after = module.lines_after

    def noted(*arguments: object) -> object:
        lines = lines_after(*arguments)  # type: ignore[arg-type]
        read.extend(line.number for line in lines)
        return lines

    monkeypatch.setattr(module, "lines_after", noted)
    monkeypatch.setattr(module, "PAGE", 2)
    for number in range(1, 6):
        journal.write(step(number))
    reader.read(journal.path)
    journal.write(step(6))
    progress = reader.read(journal.path)
    assert read == [1, 2, 3, 4, 5, 6]
    assert progress.last_step is not None and progress.last_step.step == 6


def test_a_journal_that_was_replaced_is_read_from_its_start(journal: Journal) -> None:
    reader = ProgressReader()
    for number in (1, 2, 3):
        journal.write(step(number))
    reader.read(journal.path)
    journal.path.unlink()
    journal.write(step(1))
    progress = reader.read(journal.path)
    assert progress.last_step is not None and progress.last_step.step == 1


def test_the_progress_of_few_runs_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 2)
    reader = ProgressReader()
    for name in ("a", "b", "c"):
        Journal(tmp_path / name, prints=False).write(step(1))
        reader.read(tmp_path / name)
    assert [path.name for path in reader._read] == ["b", "c"]


@pytest.fixture
def service(store: JobStore, files: FileStore, tandem_home: Path) -> FineTuningService:
    return FineTuningService(store, files, FineTuningConfig())


def test_the_feed_of_a_job_has_each_event_of_its_list_once(
    service: FineTuningService, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE", 3)
    creation = FineTuningCreation(model="base", training_file="file-1")
    job = service.create(creation, Base(name="base", id="base@1", max_rank=16), tenant="lab", key_id="").id
    feed, told = service.event_feed(job, "lab"), []
    (settings().jobs_dir / job).mkdir(parents=True)
    journal = Journal(settings().jobs_dir / job / "events.jsonl", prints=False)

    def read(feed: FineTuningFeed) -> tuple[list[FineTuningEvent], bool]:
        found = []
        while True:
            chunk = feed.next()
            found += chunk.items
            if not chunk.has_more:
                return found, chunk.ended

    for events in ([], [PLANNED], [step(number) for number in range(1, 8)], []):
        for event in events:
            journal.write(event)
        new, ended = read(feed)
        assert not ended and (len(new) == len(events) or not told)
        told += new
    store.cancel(job)
    new, ended = read(feed)
    assert ended and [event.message for event in new] == ["The job was cancelled."]
    told += new
    assert told == service.events(job, "lab") and len(told) == 10
