"""Where a job's numbers go beside its journal: TensorBoard always, Weights & Biases and MLflow where the config names them.

The driver writes each event to all of them. Each has a thread of its own, so that a slow server holds up neither training nor the
others; one that fails is left out from then on, and that is said once. A job that goes on after a stop goes on in the same run
there, and steps that it repeats are not written again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from tandem.config import MlflowConfig, TrainConfig, WandbConfig, to_dict
from tandem.errors import ConfigError

TAGS = {"step": "train", "evaluation": "evaluation"}
"""Events that hold numbers, and what stands before their names: `train/loss`, `evaluation/loss`."""
NON_METRIC_KEYS = ("event", "time", "step", "steps")
CLOSE_TIMEOUT_S = 30.0


class Sink(Protocol):
    """A system that keeps numbers by step."""

    name: str

    def write(self, event: Mapping[str, Any]) -> None:
        """Take the numbers of a `step` or `evaluation` event."""

    def close(self) -> None:
        """Write out what is held, and end the run."""


def open_sinks(config: TrainConfig, job: Path) -> list[Sink]:
    """The sinks of a job; none of them has connected yet. ConfigError if one needs a package that is not installed."""
    sinks: list[Sink] = [TensorBoard(job / "tensorboard")]
    if config.metrics.wandb is not None:
        _require("wandb", "wandb", "metrics.wandb")
        sinks.append(WeightsAndBiases(config.metrics.wandb, config, job))
    if config.metrics.mlflow is not None:
        _require("mlflow", "mlflow-skinny", "metrics.mlflow")
        sinks.append(Mlflow(config.metrics.mlflow, config, job))
    return sinks


def numbers(event: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in an event, by tag; none in an event of another kind."""
    group = TAGS.get(str(event["event"]))
    if group is None:
        return {}
    return {
        f"{group}/{key}": float(value)
        for key, value in event.items()
        if key not in NON_METRIC_KEYS and isinstance(value, int | float) and not isinstance(value, bool)
    }


class TensorBoard:
    """Event files below the job's folder; `tensorboard --logdir TANDEM_HOME/jobs` shows all jobs."""

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def write(self, event: Mapping[str, Any]) -> None:
        """Take an event; it is in the file when this returns."""
        # tensorboardX comes with Ray Train; PyTorch's own writer needs the tensorboard package, and so a web server. Of it
        # the file's format alone: its SummaryWriter hands each number to a thread, and cannot say when one is written.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        if self._writer is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Its names differ by the second and the host: two starts within a second would share a file.
            self._writer = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers(event).items()]
        self._writer.write_event(
            Event(wall_time=event.get("time", time.time()), step=event["step"], summary=Summary(value=values))
        )
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run whose id is the job's, so that the job goes on in it."""

    name = "Weights & Biases"

    def __init__(self, wanted: WandbConfig, config: TrainConfig, job: Path) -> None:
        self._wanted, self._config, self._job = wanted, config, job
        self._run: Any = None

    def write(self, event: Mapping[str, Any]) -> None:
        """Take an event."""
        if self._run is None:
            self._run = self._open()
        # The step is a number among the others: W&B's own counter refuses to go back, to an evaluation that came late.
        self._run.log({**numbers(event), "step": event["step"]})

    def _open(self) -> Any:
        import wandb

        run = wandb.init(
            project=self._wanted.project,
            entity=self._wanted.entity,
            mode="offline" if self._wanted.mode == "offline" else "online",
            id=self._job.name,
            name=self._job.name,
            resume="allow",
            dir=str(self._job),
            config=to_dict(self._config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        for group in TAGS.values():
            run.define_metric(f"{group}/*", step_metric="step")
        return run

    def close(self) -> None:
        """Send what is left."""
        if self._run is not None:
            self._run.finish()


class Mlflow:
    """A run with the job's id as the tag `tandem.job`, by which a later start finds it again."""

    name = "MLflow"
    TAG = "tandem.job"

    def __init__(self, wanted: MlflowConfig, config: TrainConfig, job: Path) -> None:
        self._wanted, self._config, self._job = wanted, config, job
        self._client: Any = None
        self._run_id = ""

    def write(self, event: Mapping[str, Any]) -> None:
        """Take an event; the server has it when this returns."""
        from mlflow.entities import Metric

        if self._client is None:
            self._open()
        at = int(1000 * event.get("time", time.time()))
        metrics = [Metric(tag, value, at, event["step"]) for tag, value in numbers(event).items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def _open(self) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        client = MlflowClient(tracking_uri=self._wanted.uri)
        known = client.get_experiment_by_name(self._wanted.experiment)
        experiment = known.experiment_id if known else client.create_experiment(self._wanted.experiment)
        runs = client.search_runs([experiment], f"tags.`{self.TAG}` = '{self._job.name}'", max_results=1)
        if runs:
            self._run_id = runs[0].info.run_id
            client.update_run(self._run_id, status="RUNNING")
        else:
            run = client.create_run(experiment, run_name=self._job.name, tags={self.TAG: self._job.name})
            self._run_id = run.info.run_id
            params = [Param(key, str(value)) for key, value in _flat(to_dict(self._config))]
            client.log_batch(self._run_id, params=params)
        self._client = client

    def close(self) -> None:
        """Mark the run as ended."""
        if self._client is not None:
            self._client.set_terminated(self._run_id)


class Metrics:
    """Gives a job's events to its sinks, each in a thread of its own; never raises, and never waits but in `close`."""

    def __init__(
        self, sinks: Iterable[Sink], *, before: Iterable[Mapping[str, Any]], notice: Callable[[str], None]
    ) -> None:
        """`before`: the events of earlier starts, whose steps the sinks have. `notice` is told, once, of a sink that failed."""
        self._notice = notice
        self._newest: dict[str, int] = {}
        for event in before:
            self._is_new(event)
        self._sinks = [_SinkThread(sink, self._notice) for sink in sinks]

    def write(self, event: Mapping[str, Any]) -> None:
        """Hand on an event, unless it has no numbers or repeats a step."""
        if event["event"] in TAGS and self._is_new(event):
            stamped = {"time": time.time(), **event}
            for sink in self._sinks:
                sink.waiting.put(stamped)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Let the sinks write what they were given, for at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        for sink in self._sinks:
            sink.waiting.put(None)
        for sink in self._sinks:
            sink.join(max(0.0, deadline - time.monotonic()))
            if sink.is_alive():
                self._notice(f"{sink.sink.name} did not take all numbers within {timeout_s:.0f} s of the end.")

    def _is_new(self, event: Mapping[str, Any]) -> bool:
        kind = str(event["event"])
        if kind not in TAGS or event["step"] <= self._newest.get(kind, 0):
            return False
        self._newest[kind] = event["step"]
        return True


@contextlib.contextmanager
def metrics_of(
    config: TrainConfig, job: Path, *, before: Iterable[Mapping[str, Any]], notice: Callable[[str], None]
) -> Iterator[Metrics]:
    """The job's metrics for the length of a block; see `Metrics`."""
    metrics = Metrics(open_sinks(config, job), before=before, notice=notice)
    try:
        yield metrics
    finally:
        metrics.close()


class _SinkThread(threading.Thread):
    """Writes to one sink what `waiting` holds, until it holds None."""

    def __init__(self, sink: Sink, notice: Callable[[str], None]) -> None:
        super().__init__(name=f"metrics to {sink.name}", daemon=True)
        self.sink = sink
        self.waiting: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._tell = notice
        self.start()

    def run(self) -> None:
        try:
            while (event := self.waiting.get()) is not None:
                self.sink.write(event)
            self.sink.close()
        except Exception as error:  # noqa: BLE001 - whatever a library raises: training goes on
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            self._tell(f"{self.sink.name} gets no more numbers: {reason}. Training goes on; events.jsonl has them all.")


def _require(module: str, package: str, key: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"{key} is set, but the package {package} is not installed where the job runs. Install it with "
            f"`pip install {package}`, or remove {key}."
        )


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
