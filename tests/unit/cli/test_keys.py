"""`tandem keys`: what it prints, and that warnings do not disturb JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandem.cli.keys import create_command, revoke_command, rotate_command


def test_a_typo_in_a_model_is_told_beside_the_json(tandem_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create_command("ci", models=["nothing"], as_json=True)
    captured = capsys.readouterr()
    assert "nothing" in captured.err
    made = json.loads(captured.out)
    rotate_command("ci", overlap="0s", as_json=True)
    second = json.loads(capsys.readouterr().out)
    assert second["secret"] != made["secret"]
    revoke_command("ci", as_json=True)
    assert json.loads(capsys.readouterr().out)["state"] == "revoked"
