"""`tandem train status`, on jobs that are only files: pictures, and how a job fares."""

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


def test_at_80_columns_the_id_of_a_job_is_whole_and_on_one_line(tandem_home: Path) -> None:
    job = "a-model-with-a-long-name-0123456789ab"
    folder = tandem_home / "jobs" / job
    folder.mkdir(parents=True)
    config = TrainConfig(name="a-model-with-a-long-name", data=DataConfig(path="d"))
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    end = {"event": "finished", "model": "a-model-with-a-long-name@12", "loss": 1.0, "steps": 3, "seconds": 9.0}
    told = [{**STEP, "step": 3, "tokens_per_s": 123_456.0}, end]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in told))
    said = CliRunner().invoke(app, ["train", "status"], env={"COLUMNS": "80"}).output
    (line,) = (line for line in said.splitlines() if job in line)
    assert "3/3" in line and "2.500" in line
    assert all(len(line) <= 80 for line in said.splitlines())


@pytest.mark.parametrize(("chars", "columns"), [(48, "80"), (64, "80"), (48, "60")])
def test_a_long_id_is_whole_at_any_width_and_other_columns_go_first(
    tandem_home: Path, chars: int, columns: str
) -> None:
    job = "a" * (chars - 13) + "-0123456789ab"
    folder = tandem_home / "jobs" / job
    folder.mkdir(parents=True)
    config = TrainConfig(name="a" * (chars - 13), data=DataConfig(path="d"))
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    end = {"event": "finished", "model": f"{config.name}@12", "loss": 1.0, "steps": 3, "seconds": 9.0}
    told = [{**STEP, "step": 3, "tokens_per_s": 123_456.0}, end]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in told))
    said = CliRunner().invoke(app, ["train", "status"], env={"COLUMNS": columns}).output
    (line,) = (line for line in said.splitlines() if job in line)
    assert " new " in line and all(len(line) <= int(columns) for line in said.splitlines())
    assert "Too narrow for" in said and " ".join(said.split()).endswith("--json has all.")


def test_the_log_of_a_job_whose_cluster_is_gone_is_its_events_in_words_or_as_json(job: str) -> None:
    said = CliRunner().invoke(app, ["train", "logs", job]).output.splitlines()
    assert said[1].endswith("step 1/3  loss 2.500  900 tok/s") and "{" not in "".join(said[1:])
    as_json = CliRunner().invoke(app, ["train", "logs", "--json", job]).output.splitlines()
    assert [json.loads(line)["event"] for line in as_json] == ["started", "step", "step", "step"]


FARED = [
    {"event": "started", "workers": 4, "layout": "tensor 2 x data 2", "resumed_from": None},
    {**STEP, "step": 14},
    {"event": "checkpoint", "step": 10, "path": "p", "time": 5.0},
    {"event": "fault", "kind": "node", "rank": 2, "reason": "gone", "step": 14},
    {"event": "resized", "from": 4, "to": 2, "layout": "tensor 2", "reason": "gone", "step": 10},
    {"event": "restart", "reason": "gone", "resumed_from": 10},
    {"event": "slow", "rank": 1, "reason": "rank 1 is slow: 9 ms"},
]


def test_an_operator_sees_workers_layout_throughput_checkpoint_and_what_was_survived(job: str, tandem_home: Path):
    (tandem_home / "jobs" / job / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in FARED))
    said = CliRunner().invoke(app, ["train", "status", job]).output
    for wanted in (
        "2 workers, tensor 2", "900", "last checkpoint: step 10", "faults: 1 x node; 1 restarts, 4 steps computed twice",
        "rank 1 is slow: 9 ms",
    ):  # fmt: skip
        assert wanted in said, said
    found = json.loads(CliRunner().invoke(app, ["train", "status", job, "--json"]).output)
    wanted = {
        "workers": 2, "layout": "tensor 2", "tokens_per_s": 900.0, "checkpoint": 10, "checkpoint_at": 5.0,
        "faults": {"node": 1}, "restarts": 1, "repeated_steps": 4, "skipped_steps": 0,
        "warnings": ["rank 1 is slow: 9 ms"],
    }  # fmt: skip
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize("arguments", [[], ["drawn-1", "--all"]])
def test_stop_takes_one_job_or_all(job: str, arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["train", "stop", *arguments])
    assert result.exit_code == 2 and "either a job's id or --all" in " ".join(result.output.split())
