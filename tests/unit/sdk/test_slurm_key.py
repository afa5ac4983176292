"""The key of a Slurm job's app: how long it lives, and what ends it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tandem.auth import ApiKey, KeyStore
from tandem.cluster.slurm.commands import JobState
from tandem.cluster.slurm.folder import Connection, Submission
from tandem.config.slurm import time_limit
from tandem.errors import ClusterError
from tandem.sdk.slurm_key import LONGEST_KEY_LIFE, extend_key, job_end, key_life, make_key, revoke_key

NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)
SUBMISSION = Submission(kind="serve", command=("serve", "up"), nodes=1, gpus_per_node=0, time="02:00:00")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("TANDEM_HOME", str(folder))
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    return folder


def made(end: datetime | None = None) -> tuple[Connection, ApiKey]:
    new = make_key("7", end)
    return Connection(job_id="7", state="ready", api_key=new.secret, api_key_id=new.key.id), new.key


@pytest.mark.parametrize(
    ("text", "hours"),
    [("30", 0.5), ("30:00", 0.5), ("02:00:00", 2), ("1-12", 36), ("1-12:30", 36.5), ("1-00:00:36", 24.01), ("0", None)],
)
def test_the_forms_of_a_time_limit_are_read(text: str, hours: float | None) -> None:
    assert time_limit(text) == (None if hours is None else timedelta(hours=hours))


def test_the_end_of_a_job_without_scontrol_is_that_of_its_variables_or_of_its_time_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = job_end(None, SUBMISSION)
    assert limit is not None and abs(limit - datetime.now(UTC) - timedelta(hours=2)) < timedelta(minutes=1)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(NOW.timestamp())))
    assert job_end(None, SUBMISSION) == NOW
    later = NOW + timedelta(hours=1)
    assert job_end(JobState(job_id="7", state="RUNNING", ends_at=later), SUBMISSION) == later


def test_each_key_expires() -> None:
    assert key_life(NOW + timedelta(hours=1), NOW) == timedelta(days=1, hours=1)
    assert key_life(None, NOW) == key_life(NOW + timedelta(days=90), NOW) == LONGEST_KEY_LIFE
    assert key_life(NOW - timedelta(days=9), NOW) == timedelta(days=1)
    _, key = made()
    assert key.expires_at is not None


def test_a_key_is_revoked_at_the_jobs_end_unless_a_successor_takes_it() -> None:
    connection, key = made()
    revoke_key(replace(connection, successor="8"))
    assert KeyStore.open().get(key.id).revoked_at is None
    revoke_key(connection)
    assert KeyStore.open().get(key.id).revoked_at is not None


def test_a_database_that_is_away_does_not_keep_a_job_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> KeyStore:
        raise ClusterError("away")

    connection, _ = made()
    monkeypatch.setattr(KeyStore, "open", refuse)
    revoke_key(connection)


def test_the_key_of_a_job_with_more_time_expires_later() -> None:
    connection, key = made(datetime.now(UTC) + timedelta(hours=1))
    extend_key(connection, minutes=90)
    assert key.expires_at is not None
    assert KeyStore.open().get(key.id).expires_at == key.expires_at + timedelta(minutes=90)
    extend_key(Connection(job_id="8", state="ready"), minutes=90)
