"""Events of jobs from the database and the journals of their runs, on SQLite and PostgreSQL; the queue's state."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from tandem.api import jobs as wire
from tandem.errors import UnknownJobError
from tandem.files.store import FileStore
from tandem.jobs.tracking.history import EventFeed, JobHistory
from tandem.jobs.tracking.positions import BEGINNING
from tandem.jobs.tracking.queue_state import QueueState
from tandem.jobs.tracking.service import JobTracking
from tandem.jobs.work.clock import ManualClock
from tandem.jobs.work.queue import ItemQueue
from tandem.jobs.work.records import ItemSubmission, JobSubmission, PastRun
from tandem.jobs.work.states import JobKind, State
from tandem.jobs.work.store import JobStore
from tandem.observability.events import Step
from tandem.observability.journal import Journal


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def journal_of(home: Path, job_id: str) -> Journal:
    folder = home / "jobs" / job_id
    folder.mkdir(parents=True, exist_ok=True)
    return Journal(folder / "events.jsonl", prints=False)


def submit(store: JobStore, name: str = "a", **options: object) -> str:
    submission = JobSubmission(**{"kind": JobKind.TRAIN, "name": name, "spec": {}, "tenant": "lab", **options})  # type: ignore[arg-type]
    return store.submit(submission).job.id


def names(feed: EventFeed) -> list[str]:
    return [event.event for event in feed.next().items]


def test_a_feed_tells_changes_of_state_and_events_of_the_run_until_the_end(store: JobStore, home: Path) -> None:
    job_id = submit(store)
    journal = journal_of(home, job_id)
    feed = EventFeed(store, store.get(job_id), BEGINNING)
    assert names(feed) == ["state"] and not feed.next().ended
    job = store.claim(job_id, "d", 60)
    assert job is not None and job.lease is not None
    journal.write(Step(step=1, loss=float("nan")))
    assert sorted(names(feed)) == ["state", "step"] and names(feed) == []
    # A line that is only half written waits for its end.
    with journal.path.open("a") as file:
        file.write('{"event": "step", ')
        file.flush()
        assert names(feed) == []
        file.write('"step": 2}\n')
    assert names(feed) == ["step"]
    last = feed.position
    store.finish(job.lease, {"model": "a@1"})
    end = feed.next()
    assert end.ended and [event.data["to"] for event in end.items] == ["finished"]
    again = EventFeed(store, store.get(job_id), last).next()
    assert again.items == end.items


def test_pages_of_events_follow_each_other(store: JobStore, home: Path) -> None:
    job_id = submit(store)
    journal = journal_of(home, job_id)
    for step in range(1, 8):
        journal.write(Step(step=step))
    tracking = JobTracking(store, QueueState(store.url), FileStore(store.url))
    found: list[wire.TandemJobEvent] = []
    after = None
    while True:
        page = tracking.events(job_id, "lab", after=after, limit=3)
        found += page.data
        after = page.last_id
        if not page.has_more:
            break
    assert [event.data["step"] for event in found if event.event == "step"] == list(range(1, 8))
    assert len({event.id for event in found}) == len(found) == 8


def test_events_of_a_job_that_was_imported_are_those_of_its_journal(
    store: JobStore, clock: ManualClock, home: Path
) -> None:
    journal = journal_of(home, "old-1")
    for step in (1, 2):
        journal.write(Step(step=step, loss=1.0))
    past = PastRun(
        state=State.FINISHED, attempt=1, handle="old-1.1", created_at=clock.now(), started_at=None, ended_at=None, error=None,
        result=None,
    )  # fmt: skip
    assert store.record(JobSubmission(kind=JobKind.TRAIN, name="old", spec={}, id="old-1"), past)
    placed, _ = JobHistory(store, store.get("old-1")).read(BEGINNING, 100)
    assert sorted(each.event.name for each in placed) == ["state", "step", "step"]
    tracking = JobTracking(store, QueueState(store.url), FileStore(store.url))
    (loss,) = tracking.metrics("old-1", None, names=["loss"]).series
    assert loss.steps == [1, 2]


def test_the_queue_counts_by_state_and_lists_what_waits_with_reasons(
    store: JobStore, queue: ItemQueue, clock: ManualClock
) -> None:
    late = submit(store, "late", priority=5)
    clock.advance(60)
    soon, held = submit(store, "soon", priority=-1), submit(store, "held", held=True)
    submit(store, "theirs", tenant="other")
    store.explain({late: "waits for 4 GPUs"})
    queue.add([ItemSubmission(queue="base@1", payload={}, tenant="lab") for _ in range(3)])
    with QueueState(store.url, clock=clock) as reader:
        state = reader.read("lab")
        assert [(each.state, each.count) for each in state.jobs] == [("held", 1), ("queued", 2)]
        assert [job.id for job in state.waiting] == [soon, late] and held not in {job.id for job in state.waiting}
        assert state.waiting[1].reason == "waits for 4 GPUs" and state.requests == {"queued": 3}
        assert state.oldest_waiting_s == pytest.approx(timedelta(minutes=1).total_seconds())
        assert len(reader.read().waiting) == 3 and reader.read("nobody").oldest_waiting_s is None


def test_a_job_of_another_tenant_is_unknown(store: JobStore) -> None:
    job_id = submit(store)
    tracking = JobTracking(store, QueueState(store.url), FileStore(store.url))
    assert tracking.get(job_id, None).id == job_id
    for ask in (tracking.get, tracking.metrics, tracking.lineage):
        with pytest.raises(UnknownJobError):
            ask(job_id, "other")
    with pytest.raises(UnknownJobError):
        tracking.change(job_id, "other", "cancel")
    assert store.get(job_id).state is State.QUEUED


def test_the_lineage_has_parent_children_base_and_result(store: JobStore, home: Path) -> None:
    spec = {"model": {"base": "base@1"}, "data": {"path": str(home / "data" / "gone")}}
    parent = submit(store, "parent", spec=spec)
    children = [submit(store, f"child{number}", parent=parent) for number in range(2)]
    job = store.claim(parent, "d", 60)
    assert job is not None and job.lease is not None
    store.finish(job.lease, {"model": "parent@1"})
    lineage = JobTracking(store, QueueState(store.url), FileStore(store.url)).lineage(parent, "lab")
    assert (lineage.base, lineage.result_model, lineage.children) == ("base@1", "parent@1", children[::-1])
    assert [(each.role, each.digest) for each in lineage.datasets] == [("training", None)]
