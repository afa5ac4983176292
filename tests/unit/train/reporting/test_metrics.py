"""Metric sinks get each step once; a failing sink gets no more events, and training never waits for one."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import stored_metrics

from tandem.config import DataConfig, MetricsConfig, MlflowConfig, TrainConfig, WandbConfig
from tandem.errors import ConfigError
from tandem.observability.events import Evaluated, Event, Restarted, Started, Step
from tandem.train.reporting.metrics import Metrics, TensorBoard, metrics_by_tag, metrics_of, open_sinks

CONFIG = TrainConfig(name="a", data=DataConfig(path="x"))


def step(number: int) -> Step:
    return Step(step=number, steps=9, loss=4.0 / number, mfu=0.25)


def evaluation(number: int) -> Evaluated:
    return Evaluated(step=number, measured={"loss": 2.0, "perplexity": 7.5})


def run(config: TrainConfig, job: Path, before: list[Event], now: list[Event]) -> list[str]:
    """One start of a driver: gives the events to the config's sinks; returns what was noticed."""
    said: list[str] = []
    with metrics_of(config, job, earlier_events=before, notice=said.append) as metrics:
        for event in now:
            metrics.write(event)
    return said


class Kept:
    """A sink that keeps the steps it was given; it can be told to fail, or to wait."""

    def __init__(self, name: str = "kept", fails_at: int = 0, gate: threading.Event | None = None) -> None:
        self.name, self.fails_at, self.gate = name, fails_at, gate
        self.steps: list[int] = []

    def write(self, event: Step) -> None:
        if self.gate is not None:
            self.gate.wait(30)
        if event.step == self.fails_at:
            raise ConnectionError("the server\nis gone")
        self.steps.append(event.step)

    def close(self) -> None: ...


def test_the_tag_of_a_metric_begins_with_the_kind_of_its_event():
    assert metrics_by_tag(Step(time=1.0, step=3, steps=9, loss=2.0, metrics={"loss_scale": 8.0})) == {"train/loss": 2.0}
    evaluated = Evaluated(step=3, rows=4, averaged=True, measured={"perplexity": 7.5})
    assert metrics_by_tag(evaluated) == {"evaluation/perplexity": 7.5, "evaluation/rows": 4.0}


def test_tensorboard_gets_every_step_once_over_a_restart_and_a_resumed_run(tmp_path: Path):
    first = [
        step(1),
        step(2),
        evaluation(2),
        step(3),
        Restarted(resumed_from=1),
        step(2),
        step(3),
        step(4),
    ]
    again = [Started(resumed_from=2), step(3), step(4), evaluation(4), step(5)]
    assert run(CONFIG, tmp_path, [], first) == run(CONFIG, tmp_path, first, again) == []
    found = stored_metrics.tensorboard(tmp_path / "tensorboard")
    assert sorted(found) == ["evaluation/loss", "evaluation/perplexity", "evaluation/rows", "train/loss", "train/mfu"]
    assert found["train/loss"] == [(n, pytest.approx(4.0 / n)) for n in range(1, 6)]
    assert found["evaluation/perplexity"] == [(2, 7.5), (4, 7.5)]


def test_tensorboard_flushes_each_event(tmp_path: Path):
    sink = TensorBoard(tmp_path)
    sink.write(step(1))
    assert stored_metrics.tensorboard(tmp_path)["train/loss"] == [(1, 4.0)]
    sink.close()


def test_a_resumed_job_continues_its_wandb_run(tmp_path: Path):
    job = tmp_path / "a-123"
    job.mkdir()
    config = replace(CONFIG, metrics=MetricsConfig(wandb=WandbConfig(project="p", mode="offline")))
    first = [step(1), step(2), step(3), evaluation(2)]
    again = [step(3), step(4)]
    assert run(config, job, [], first) == run(config, job, first, again) == []
    import wandb

    wandb.teardown()  # its service would outlive the test
    ids, found = stored_metrics.wandb_offline(job)
    assert ids == {"a-123"}
    assert found["train/loss"] == [(n, pytest.approx(4.0 / n)) for n in range(1, 5)]
    assert found["evaluation/perplexity"] == [(2, 7.5)], "an evaluation that comes late is not lost"


def test_a_resumed_job_continues_its_mlflow_run(tmp_path: Path):
    job = tmp_path / "a-123"
    job.mkdir()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = replace(CONFIG, metrics=MetricsConfig(mlflow=MlflowConfig(uri=uri, experiment="e")))
    first = [step(1), step(2), evaluation(2), step(3)]
    again = [step(3), step(4)]
    assert run(config, job, [], first) == run(config, job, first, again) == []
    jobs, found = stored_metrics.mlflow(uri, "e")
    assert jobs == {"a-123"}
    assert found["train/loss"] == [(n, pytest.approx(4.0 / n)) for n in range(1, 5)]
    assert found["evaluation/loss"] == [(2, 2.0)]


def test_a_failing_sink_is_reported_once_and_the_others_continue():
    said: list[str] = []
    bad, good = Kept("the bad one", fails_at=2), Kept()
    metrics = Metrics([bad, good], earlier_events=[], notice=said.append)
    for n in range(1, 6):
        metrics.write(step(n))
    metrics.close()
    assert (bad.steps, good.steps) == ([1], [1, 2, 3, 4, 5])
    assert said == ["the bad one gets no more metrics: the server. Training continues; events.jsonl has all of them."]


def test_a_hanging_sink_delays_neither_the_others_nor_the_end():
    said: list[str] = []
    gate = threading.Event()
    slow, good = Kept("the slow one", gate=gate), Kept()
    metrics = Metrics([slow, good], earlier_events=[], notice=said.append)
    for n in range(1, 4):
        metrics.write(step(n))
    metrics.close(timeout_s=0.5)
    assert good.steps == [1, 2, 3]
    assert said == ["the slow one did not take all numbers within 0 s of the end."]
    gate.set()


def test_an_unreachable_server_is_reported_and_training_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
        config = replace(CONFIG, metrics=MetricsConfig(mlflow=MlflowConfig(uri=uri)))
        (said,) = run(config, tmp_path, [], [step(1), step(2)])
    assert said.startswith("MLflow gets no more metrics: ")
    assert "Max retries exceeded" in said or "refused" in said
    assert len(stored_metrics.tensorboard(tmp_path / "tensorboard")["train/loss"]) == 2


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (MetricsConfig(wandb=WandbConfig(project="p")), "metrics.wandb is set, .* `pip install wandb`"),
        (MetricsConfig(mlflow=MlflowConfig(uri="x")), "metrics.mlflow is set, .* `pip install mlflow-skinny`"),
    ],
)
def test_a_missing_package_is_refused_with_the_install_command(
    metrics: MetricsConfig, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=said):
        open_sinks(replace(CONFIG, metrics=metrics), tmp_path)


def test_a_job_without_these_sinks_imports_neither_wandb_nor_mlflow():
    code = "import sys, tandem.train.reporting.metrics; print([m for m in ('wandb', 'mlflow', 'torch') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
