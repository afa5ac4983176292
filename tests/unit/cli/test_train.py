"""`tandem train status --plot`, on jobs that are only files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tandem.cli.main import app
from tandem.config import DataConfig, TrainConfig, to_dict

STEP = {"event": "step", "loss": 2.5, "tokens_per_s": 900.0, "learning_rate": 0.001, "steps": 3}


@pytest.fixture
def job(tandem_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tandem_home / "jobs" / "drawn-1"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(TrainConfig(name="drawn", data=DataConfig(path="d")))))
    told = [{"event": "started"}, *({**STEP, "step": n} for n in (1, 2, 3))]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in told))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return "drawn-1"


def test_a_job_is_drawn_here_or_where_it_is_wanted(job: str, tmp_path: Path):
    assert CliRunner().invoke(app, ["train", "status", job, "--plot"]).exit_code == 0
    assert CliRunner().invoke(app, ["train", "status", "latest", "--plot", "a.png"]).exit_code == 0
    (tmp_path / "pictures").mkdir()
    assert CliRunner().invoke(app, ["train", "status", job, "--plot", "pictures"]).exit_code == 0
    for name in ("drawn-1.png", "a.png", "pictures/drawn-1.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG"), name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--plot"], "--plot draws one job"),
        (["drawn-1", "x.png"], "one argument too many"),
        (["no", "--plot"], "No job"),
    ],
)
def test_what_cannot_be_drawn_is_refused(job: str, arguments: list[str], said: str):
    result = CliRunner().invoke(app, ["train", "status", *arguments])
    assert result.exit_code in (1, 2)
    assert said in result.output


def test_a_job_without_a_step_is_not_drawn(job: str, tandem_home: Path):
    (tandem_home / "jobs" / job / "events.jsonl").write_text("")
    result = CliRunner().invoke(app, ["train", "status", job, "--plot"])
    assert result.exit_code == 1
    assert "has not reported a step yet" in result.output
