"""Files of the access log: private ones, rotated too; a disk that is full is told and stops nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from pathlib import Path

import pytest

from tandem.gateway.accounting import access_log
from tandem.gateway.accounting.access_log import AccessLog


async def test_rotated_files_are_private_and_only_some_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_log, "MAX_FILE_BYTES", 200)
    log = AccessLog(tmp_path / "logs" / "access.jsonl")
    for number in range(60):
        log.add({"number": number, "path": "/v1/completions"})
        if number % 3 == 2:
            log._flush()
    await log.stop()
    files = sorted((tmp_path / "logs").iterdir())
    assert len(files) == 1 + access_log.KEPT_FILES
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert all(file.stat().st_size <= 200 for file in files)
    assert '"number": 59' in files[0].read_text() and '"number": 56' in files[1].read_text()


async def test_a_batch_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AccessLog(tmp_path / "logs" / "access.jsonl")
    batches: list[bytes] = []
    append = log._append

    def counted(batch: bytes) -> None:
        batches.append(batch)
        append(batch)

    monkeypatch.setattr(log, "_append", counted)
    for number in range(1000):
        log.add({"number": number})
    await log.stop()
    assert len(batches) == 1 and len((tmp_path / "logs" / "access.jsonl").read_text().splitlines()) == 1000


async def test_files_of_ended_gateways_are_removed_a_week_after_their_last_line(tmp_path: Path) -> None:
    days = {
        "access-old.jsonl": 8,
        "access-old.jsonl.1": 9,
        "access-new.jsonl": 6,
        "access-mine.jsonl.2": 30,
        "other": 30,
    }
    for name, age in days.items():
        (tmp_path / name).write_text("{}\n")
        at = time.time() - age * 86_400
        os.utime(tmp_path / name, (at, at))
    log = AccessLog(tmp_path / "access-mine.jsonl")
    log.start()
    deadline = time.monotonic() + 60
    while (tmp_path / "access-old.jsonl.1").exists() or (tmp_path / "access-old.jsonl").exists():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    await log.stop()
    assert set(os.listdir(tmp_path)) == {"access-new.jsonl", "access-mine.jsonl.2", "other"}


async def test_a_file_that_was_removed_is_made_again(tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "access-mine.jsonl")
    log.add({"number": 1})
    log._flush()
    (tmp_path / "access-mine.jsonl").unlink()
    log.add({"number": 2})
    await log.stop()
    assert "2" in (tmp_path / "access-mine.jsonl").read_text()


async def test_a_full_disk_is_told_with_the_number_of_lines(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AccessLog(Path("/dev/full"))
    monkeypatch.setattr(access_log, "make_private_folder", lambda path: None)
    log.add({"path": "/v1/completions"})
    with caplog.at_level(logging.WARNING):
        await log.stop()
    assert "cannot be written" in caplog.text and "1 lines are lost" in caplog.text
