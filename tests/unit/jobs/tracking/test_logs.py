"""Logs of runs: of the attempt that runs from its cluster, of those that have ended from the copy in the job's folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from tandem.errors import JobError, UnknownLogError
from tandem.jobs.client import JobClient
from tandem.jobs.dispatch.runner import RunState
from tandem.jobs.folder import JobState
from tandem.jobs.runners.ray import RayRunner
from tandem.jobs.tracking.logs import LogFeed, keep_log, log_path
from tandem.jobs.work.records import JobSubmission, Lease
from tandem.jobs.work.states import JobKind
from tandem.jobs.work.store import JobStore


class ClusterLogs:
    """Logs of a cluster by submission, as its dashboard has them."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = {}

    def log_lines(self, submission: str) -> Iterator[str]:
        """See `LogSource`."""
        if submission not in self.lines:
            raise JobError(f"no log of {submission}")
        yield from self.lines[submission]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def start(store: JobStore) -> tuple[str, Lease]:
    store.submit(JobSubmission(kind=JobKind.TRAIN, name="a", spec={}, id="a-1", content_hash="c"))
    job = store.claim("a-1", "d", 60)
    assert job is not None and job.lease is not None
    return job.run_name, job.lease


def feed_of(store: JobStore, logs: ClusterLogs | None, attempt: int | None = None, after: int = 0) -> LogFeed:
    return LogFeed(lambda: store.get("a-1"), None if logs is None else lambda: logs, attempt, after)


def test_a_running_attempts_log_is_read_from_its_cluster_line_by_line(store: JobStore, home: Path) -> None:
    run, _ = start(store)
    logs = ClusterLogs()
    logs.lines[run] = ["one", "two"]
    feed = feed_of(store, logs)
    assert [(each.attempt, each.line, each.text) for each in feed.next().items] == [(1, 1, "one"), (1, 2, "two")]
    logs.lines[run].append("three")
    chunk = feed.next()
    assert [(each.line, each.text) for each in chunk.items] == [(3, "three")] and not chunk.ended
    assert [each.text for each in feed_of(store, logs, after=2).next().items] == ["three"]


def test_the_log_of_an_ended_attempt_is_read_without_its_cluster(store: JobStore, home: Path) -> None:
    run, lease = start(store)
    logs = ClusterLogs()
    logs.lines[run] = ["one"]
    feed = feed_of(store, logs)
    assert len(feed.next().items) == 1
    logs.lines[run] += ["two", "ends \u2028 here"]
    keep_log(home / "jobs" / "a-1", 1, lambda: logs.log_lines(run))
    store.finish(lease)
    # One that was being followed goes on with the copy.
    chunk = feed.next()
    assert [(each.line, each.text) for each in chunk.items] == [(2, "two"), (3, "ends \u2028 here")] and chunk.ended
    assert [each.line for each in feed_of(store, None).next().items] == [1, 2, 3]
    assert log_path(home / "jobs" / "a-1", 1).stat().st_mode & 0o077 == 0


def test_a_copy_is_made_once(home: Path) -> None:
    keep_log(home, 1, lambda: ["one"])
    keep_log(home, 1, lambda: ["other"])
    assert log_path(home, 1).read_text() == "one\n"


def test_a_log_that_is_nowhere_is_refused_with_the_reason(store: JobStore, home: Path) -> None:
    store.submit(JobSubmission(kind=JobKind.BATCH, name="b", spec={}, id="b-1"))
    with pytest.raises(UnknownLogError, match="kind batch, which has no log"):
        LogFeed(lambda: store.get("b-1"), None, None, 0).next()
    _, lease = start(store)
    with pytest.raises(UnknownLogError, match="has no attempt 2; it was started 1 times"):
        feed_of(store, None, attempt=2).next()
    store.finish(lease)
    with pytest.raises(UnknownLogError, match="No log of a-1.1 is kept"):
        feed_of(store, None).next()
    with pytest.raises(JobError, match="no log of"):
        feed_of(store, ClusterLogs()).next()


class StoppedCluster(ClusterLogs):
    """A cluster on which every run was stopped."""

    def known_state(self, submission: str) -> JobState:
        """See `JobClient`."""
        return JobState.STOPPED


def test_the_runner_keeps_the_log_of_an_attempt_that_has_ended(home: Path) -> None:
    cluster = StoppedCluster()
    cluster.lines["a-1.2"] = ["one"]
    runner = RayRunner(lambda: cast(JobClient, cluster))
    for run in ("a-1.2", "a-1.3"):
        # Of the second the cluster has no log: its end counts all the same.
        status = runner.state(run)
        assert status is not None and status.state is RunState.STOPPED
    assert log_path(home / "jobs" / "a-1", 2).read_text() == "one\n"
    assert not log_path(home / "jobs" / "a-1", 3).exists()


def test_a_job_that_has_not_started_has_an_empty_log_which_is_followed(store: JobStore, home: Path) -> None:
    store.submit(JobSubmission(kind=JobKind.TRAIN, name="a", spec={}, id="a-1", content_hash="c"))
    logs = ClusterLogs()
    feed = feed_of(store, logs)
    chunk = feed.next()
    assert chunk.items == [] and not chunk.ended
    run, _ = start(store)
    logs.lines[run] = ["one"]
    assert [each.text for each in feed.next().items] == ["one"]
