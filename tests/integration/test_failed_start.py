"""An engine that cannot start: `tandem serve up` ends with the engine's own error and a log that is still there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import tandem
from serve_fixtures import free_port, write_model


@pytest.mark.slow  # a vLLM engine starts and fails
def test_serve_up_of_damaged_weights_says_what_vllm_said(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "damaged") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    home = tmp_path / "home"
    done = tandem("serve", "up", str(tmp_path / "damaged"), "--port", str(free_port()), home=home)
    assert done.returncode == 1, done.stdout
    assert "SafetensorError: Error while deserializing header: incomplete metadata" in done.stdout
    assert "Traceback" not in done.stdout and "root cause above" not in done.stdout
    # The cluster and its files are gone; the log is not.
    log = re.search(r"Its log is (\S+) on the node", done.stdout)
    assert log and "SafetensorError" in Path(log[1]).read_text()
