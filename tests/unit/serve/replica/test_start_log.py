"""A start that failed tells the engine's last error and a log file that outlives the cluster."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tandem.engine.vllm.descriptor import VLLM
from tandem.errors import EngineError
from tandem.serve.replica import start_log
from tandem.serve.replica.start_log import StartLog

ERROR = EngineError(
    "vLLM could not load /m: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
)


def test_the_error_has_what_was_written_since_and_the_path_of_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    written = tmp_path / "worker.err"
    written.write_text("ValueError: of another start\n")
    monkeypatch.setattr(start_log, "_ray_log_files", lambda: [written])
    log = StartLog("engine-m", VLLM)
    with written.open("a") as file:
        file.write("(EngineCore pid=3) ValueError: max seq len 2048 needs more cache\n")
    said = str(log.with_engine_output(ERROR))
    kept = tmp_path / "home" / "logs" / "engine-m.log"
    assert said == (
        "vLLM could not load /m: ValueError: max seq len 2048 needs more cache. "
        f"Its log is {kept} on the node {socket.gethostname()}."
    )
    assert kept.read_text() == "(EngineCore pid=3) ValueError: max seq len 2048 needs more cache\n"
    assert kept.stat().st_mode & 0o77 == 0


def test_where_no_copy_can_be_kept_the_log_of_ray_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("a file, so no folder can be created below it")
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    written = tmp_path / "worker.err"
    written.touch()
    monkeypatch.setattr(start_log, "_ray_log_files", lambda: [written])
    assert f"Its log is {written} on the node" in str(StartLog("engine-m", VLLM).with_engine_output(ERROR))
