"""A backup of database and files that is taken while jobs run doubles nothing when it is restored."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from dispatch_world import DEADLINE_S, script
from postgresql import Server

from tandem.db.backup import backup, restore
from tandem.files.content import ContentStore, read_chunks
from tandem.files.store import FileStore
from tandem.jobs.batches import runner as batch_runner
from tandem.jobs.batches.answers import SegmentWriter, output_line
from tandem.jobs.batches.model_checks import ModelChecks
from tandem.jobs.batches.runner import BatchRunner
from tandem.jobs.batches.stored import QUEUE, RUNNER, answers_folder
from tandem.jobs.dispatch.decisions import Capacity
from tandem.jobs.dispatch.dispatcher import Dispatcher
from tandem.jobs.dispatch.runner import Runner
from tandem.jobs.runners.processes import ProcessRunner
from tandem.jobs.work.clock import ManualClock
from tandem.jobs.work.queue import ItemQueue
from tandem.jobs.work.records import Answer, Item, Job, JobSubmission, Resources
from tandem.jobs.work.states import JobKind, State
from tandem.jobs.work.store import JobStore

REQUESTS = 12


@dataclass
class Life:
    """A dispatcher with its runners on one database, and a gateway that answers items."""

    store: JobStore
    queue: ItemQueue
    files: FileStore
    dispatcher: Dispatcher
    clock: ManualClock

    def claim(self, count: int) -> list[Item]:
        return self.queue.claim(QUEUE, "gateway", 60.0, limit=count)

    def answer(self, job: str, count: int, text: str) -> None:
        """Answer as many items of a batch, as a gateway does."""
        segment = SegmentWriter(answers_folder(job))
        items = self.claim(count)
        body = json.dumps({"text": text}).encode()
        lines = [output_line(i.id, str((i.payload or {})["custom_id"]), 200, "r", body) for i in items]
        places = segment.append(lines)
        segment.close()
        pairs = zip(items, places, strict=True)
        self.queue.report([Answer(lease=i.lease, result_reference=str(p)) for i, p in pairs if i.lease is not None])

    def until(self, done: Callable[[], bool], *, step_s: float = 0.0) -> None:
        """Rounds of the dispatcher until something holds; its clock goes on by `step_s` in each."""
        deadline = time.monotonic() + DEADLINE_S
        while not done():
            assert time.monotonic() < deadline, "the dispatcher makes no progress"
            self.dispatcher.round()
            self.clock.advance(step_s)
            time.sleep(0.02)

    def states(self) -> dict[str, State]:
        return {job.name: job.state for job in self.store.page(limit=100).jobs}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(batch_runner, "POLL_S", 0.02)
    # There is no gateway, which would look up the models.
    monkeypatch.setattr(ModelChecks, "refusals", lambda self, job: {})
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def life(home: Path, clock: ManualClock) -> Iterator[Callable[[str], Life]]:
    """Begins a life on a database."""
    with ExitStack() as stack:
        # What still runs at the end, as after a failed test, ends too.
        stack.callback((home.parent / "go").touch)

        def command(job: Job) -> list[str]:
            text = f'cd "{home.parent}"; echo {job.run_name} >> starts; {job.spec["script"]}'
            return ["/bin/sh", "-c", text, "job"]

        def begin(url: str) -> Life:
            store = stack.enter_context(JobStore(url, clock=clock))
            queue = stack.enter_context(ItemQueue(url, clock=clock))
            files = stack.enter_context(FileStore(url))
            checks = stack.enter_context(ModelChecks(url, clock=clock))
            contents = ContentStore.open(store.identity, str(home / "files"))
            batches = BatchRunner(store, queue, checks, files, contents, tenant_bytes=2**30, max_attempts=3)
            runners: dict[str, Runner] = {"process": ProcessRunner(home / "runs", command), RUNNER: batches}
            dispatcher = Dispatcher(store, runners, lambda: Capacity(cpus=3))
            stack.callback(dispatcher.close)
            return Life(store, queue, files, dispatcher, clock)

        yield begin


@pytest.fixture
def empty_url(url: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of the same kind."""
    if url.startswith("sqlite"):
        return f"sqlite:///{tmp_path}/restored.db"
    server: Server = request.getfixturevalue("postgresql_server")
    return str(server.create(uuid.uuid4().hex))


def submit_batch(life: Life, path: Path) -> str:
    body = {"model": "m", "prompt": "p"}
    lines = [
        {"custom_id": f"id-{n}", "method": "POST", "url": "/v1/completions", "body": body} for n in range(REQUESTS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = {"endpoint": "/v1/completions", "location": str(path)}
    batch = JobSubmission(
        kind=JobKind.BATCH, name="batch", spec=spec, tenant="red", runner=RUNNER, resources=Resources(cpus_per_worker=0)
    )
    return life.store.submit(batch).job.id


def test_a_restore_of_database_and_files_ends_every_job_once_and_answers_every_item_once(
    url: str, empty_url: str, home: Path, life: Callable[[str], Life], tmp_path: Path
) -> None:
    waits = "while [ ! -e go ]; do sleep 0.05; done"
    first = life(url)
    ids = {name: first.store.submit(script(name, "true")).job.id for name in ("done-1", "done-2")}
    first.until(lambda: all(state is State.FINISHED for state in first.states().values()))
    ids |= {name: first.store.submit(script(name, waits)).job.id for name in ("runs-1", "runs-2")}
    batch = submit_batch(first, home / "requests.jsonl")
    first.until(lambda: starts(tmp_path).total() == 4 and sum(first.queue.counts(batch).values()) == REQUESTS)
    first.answer(batch, 4, "before")
    under_way = first.claim(2)
    ids["queued"] = first.store.submit(script("queued", "true")).job.id

    backup(url, tmp_path / "backup")
    # The cluster goes on: files are copied later than the database.
    first.until(lambda: first.states()["queued"] is State.FINISHED)
    first.answer(batch, 2, "between")
    shutil.copytree(home, tmp_path / "copy")
    first.store.submit(script("lost", "true"))
    (tmp_path / "go").touch()
    first.until(lambda: first.states()["lost"] is State.FINISHED and first.states()["runs-1"].ended)
    first.until(lambda: first.states()["runs-2"].ended)
    first.dispatcher.resign()
    shutil.rmtree(home)

    shutil.copytree(tmp_path / "copy", home)
    restore(empty_url, tmp_path / "backup")
    second = life(empty_url)
    assert second.queue.counts(batch)[State.FINISHED] == 4
    second.clock.advance(61.0)

    def answered() -> bool:
        second.answer(batch, 5, "after")
        return all(state.ended for state in second.states().values())

    second.until(answered, step_s=1.0)
    assert set(second.states().values()) == {State.FINISHED} and set(second.states()) == {*ids, "batch"}
    # What had ended ran once; what was under way was tried once more, as its processes were not there any more.
    assert {name: run_numbers(tmp_path, ids[name]) for name in ids} == {
        "done-1": [1], "done-2": [1], "queued": [1], "runs-1": [1, 2], "runs-2": [1, 2],
    }  # fmt: skip
    assert set(starts(tmp_path).values()) == {1}
    result = second.store.get(batch).result or {}
    output = b"".join(read_chunks(second.files.get(result["output_file_id"], "red").location))
    texts = {line["custom_id"]: line["response"]["body"]["text"] for line in map(json.loads, output.splitlines())}
    assert len(output.splitlines()) == REQUESTS and result["error_file_id"] is None
    # Answers of before the backup are kept; those in between were reported to the database that is gone.
    assert Counter(texts.values()) == {"before": 4, "after": REQUESTS - 4} and len(under_way) == 2


def starts(folder: Path) -> Counter[str]:
    """Number of times that each attempt was started, in both lives."""
    path = folder / "starts"
    return Counter(path.read_text().split()) if path.exists() else Counter()


def run_numbers(folder: Path, job_id: str) -> list[int]:
    """The attempts of a job that were started."""
    names = (name.rpartition(".") for name in starts(folder))
    return sorted(int(attempt) for job, _, attempt in names if job == job_id)
