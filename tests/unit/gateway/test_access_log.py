"""Files of the access log: private ones, rotated too; a disk that is full is told and stops nothing."""

from __future__ import annotations

import logging
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
    await log.stop()
    files = sorted((tmp_path / "logs").iterdir())
    assert len(files) == 1 + access_log.KEPT_FILES
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert '"number": 59' in files[0].read_text()


async def test_a_full_disk_is_told_with_the_number_of_lines(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AccessLog(Path("/dev/full"))
    monkeypatch.setattr(access_log, "make_private_folder", lambda path: None)
    log.add({"path": "/v1/completions"})
    with caplog.at_level(logging.WARNING):
        await log.stop()
    assert "cannot be written" in caplog.text and "1 lines are lost" in caplog.text
