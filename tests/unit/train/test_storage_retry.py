"""Operations on storage are retried while it is unavailable."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.errors import StorageError
from tandem.observability.events import CheckpointSaved
from tandem.observability.journal import Journal
from tandem.train.storage_retry import backoff_delays, retry_storage, wait_for_storage


def test_a_refused_operation_is_retried_with_exponential_backoff():
    tries, slept, told = [0], list[float](), list[str]()

    def write() -> str:
        tries[0] += 1
        if tries[0] < 4:
            raise StorageError("gone.")
        return "written"

    assert retry_storage(write, limit_s=100, give_up=lambda: False, notify=told.append, sleep=slept.append) == "written"
    assert slept == [1, 2, 4] and told == ["gone. It is tried again for 100 s."]


def test_retries_end_after_the_limit_or_when_the_failure_is_permanent():
    def refuse() -> None:
        raise StorageError("gone.")

    slept: list[float] = []
    with pytest.raises(StorageError):
        retry_storage(refuse, limit_s=100, give_up=lambda: False, notify=lambda message: None, sleep=slept.append)
    assert sum(slept) == 100 and max(slept) == 30 and list(backoff_delays(0)) == []
    with pytest.raises(StorageError):
        retry_storage(refuse, limit_s=100, give_up=lambda: True, notify=lambda message: None, sleep=slept.append)
    assert sum(slept) == 100


def test_a_run_with_checkpoints_waits_for_their_folder(tmp_path: Path):
    journal, root = Journal(tmp_path / "events.jsonl"), tmp_path / "checkpoints"
    wait_for_storage(root, journal, 0)
    journal.write(CheckpointSaved(step=40, path=str(root)))
    with pytest.raises(StorageError, match="is not there, though a checkpoint of step 40 was written"):
        wait_for_storage(root, journal, 0)
    wait_for_storage(root, journal, 5, sleep=lambda seconds: root.mkdir())
