"""Metric sinks of a training job: TensorBoard always, Weights & Biases and MLflow if the config names them.

The driver hands `step` and `evaluation` events to every sink. Each sink has its own thread, so that a slow server delays neither
training nor the other sinks; a sink that fails gets no more events, and one notice says so. A resumed job continues the same run
in each sink, and repeated steps are not written again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from tandem.config import MlflowConfig, TrainConfig, WandbConfig, to_dict
from tandem.errors import ConfigError
from tandem.observability.codec import to_json
from tandem.observability.events import Evaluated, Event, Step

TAG_PREFIXES = {Step: "train", Evaluated: "evaluation"}
"""Prefix of the tags of each kind of event that holds metrics: `train/loss`, `evaluation/loss`."""
NON_METRIC_KEYS = ("event", "time", "step", "steps")
CLOSE_TIMEOUT_S = 30.0


MetricEvent = Step | Evaluated


class Sink(Protocol):
    """A system that stores metrics by step."""

    name: str

    def write(self, event: MetricEvent) -> None:
        """Store the metrics of an event."""

    def close(self) -> None:
        """Flush, and end the run."""


def open_sinks(config: TrainConfig, job: Path) -> list[Sink]:
    """The sinks of a job, not connected yet. ConfigError if one needs a package that is not installed."""
    sinks: list[Sink] = [TensorBoard(job / "tensorboard")]
    if config.metrics.wandb is not None:
        _require_package("wandb", "wandb", "metrics.wandb")
        sinks.append(WeightsAndBiases(config.metrics.wandb, config, job))
    if config.metrics.mlflow is not None:
        _require_package("mlflow", "mlflow-skinny", "metrics.mlflow")
        sinks.append(Mlflow(config.metrics.mlflow, config, job))
    return sinks


def metrics_by_tag(event: MetricEvent) -> dict[str, float]:
    """The metrics in an event, by tag."""
    prefix = TAG_PREFIXES[type(event)]
    return {
        f"{prefix}/{key}": float(value)
        for key, value in to_json(event).items()
        if key not in NON_METRIC_KEYS and isinstance(value, int | float) and not isinstance(value, bool)
    }


class TensorBoard:
    """Event files below the job's folder; `tensorboard --logdir TANDEM_HOME/jobs` shows all jobs."""

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def write(self, event: MetricEvent) -> None:
        """Write an event; it is in the file on return."""
        # tensorboardX comes with Ray Train; PyTorch's own writer needs the tensorboard package, and so a web server. Of it
        # the file's format alone: its SummaryWriter hands each number to a thread, and cannot say when one is written.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        if self._writer is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Its names differ by the second and the host: two starts within a second would share a file.
            self._writer = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics_by_tag(event).items()]
        self._writer.write_event(
            Event(wall_time=event.time or time.time(), step=event.step, summary=Summary(value=values))
        )
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run whose id is the job's, so that a resumed job continues it."""

    name = "Weights & Biases"

    def __init__(self, settings: WandbConfig, config: TrainConfig, job: Path) -> None:
        self._settings, self._config, self._job = settings, config, job
        self._run: Any = None

    def write(self, event: MetricEvent) -> None:
        """Log an event."""
        if self._run is None:
            self._run = self._open()
        # The step is logged as a metric: W&B's own step counter must not decrease, and an evaluation may be logged late.
        self._run.log({**metrics_by_tag(event), "step": event.step})

    def _open(self) -> Any:
        import wandb

        run = wandb.init(
            project=self._settings.project,
            entity=self._settings.entity,
            mode="offline" if self._settings.mode == "offline" else "online",
            id=self._job.name,
            name=self._job.name,
            resume="allow",
            dir=str(self._job),
            config=to_dict(self._config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        for group in TAG_PREFIXES.values():
            run.define_metric(f"{group}/*", step_metric="step")
        return run

    def close(self) -> None:
        """Send the remaining data."""
        if self._run is not None:
            self._run.finish()


class Mlflow:
    """A run with the job's id in the tag `tandem.job`, by which a later start finds it."""

    name = "MLflow"
    TAG = "tandem.job"

    def __init__(self, settings: MlflowConfig, config: TrainConfig, job: Path) -> None:
        self._settings, self._config, self._job = settings, config, job
        self._client: Any = None
        self._run_id = ""

    def write(self, event: MetricEvent) -> None:
        """Send an event; the server has it on return."""
        from mlflow.entities import Metric

        if self._client is None:
            self._open()
        timestamp_ms = int(1000 * (event.time or time.time()))
        metrics = [Metric(tag, value, timestamp_ms, event.step) for tag, value in metrics_by_tag(event).items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def _open(self) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        client = MlflowClient(tracking_uri=self._settings.uri)
        existing = client.get_experiment_by_name(self._settings.experiment)
        experiment = existing.experiment_id if existing else client.create_experiment(self._settings.experiment)
        runs = client.search_runs([experiment], f"tags.`{self.TAG}` = '{self._job.name}'", max_results=1)
        if runs:
            self._run_id = runs[0].info.run_id
            client.update_run(self._run_id, status="RUNNING")
        else:
            run = client.create_run(experiment, run_name=self._job.name, tags={self.TAG: self._job.name})
            self._run_id = run.info.run_id
            params = [Param(key, str(value)) for key, value in _flatten(to_dict(self._config))]
            client.log_batch(self._run_id, params=params)
        self._client = client

    def close(self) -> None:
        """Mark the run as ended."""
        if self._client is not None:
            self._client.set_terminated(self._run_id)


class Metrics:
    """Hands a job's events to its sinks, each in its own thread. Never raises, and blocks in `close` only."""

    def __init__(
        self, sinks: Iterable[Sink], *, earlier_events: Iterable[Event], notice: Callable[[str], None]
    ) -> None:
        """`earlier_events`: events of earlier starts, already written. `notice` gets one message for a sink that fails."""
        self._notice = notice
        self._newest: dict[str, int] = {}
        for event in earlier_events:
            self._is_new(event)
        self._sinks = [_SinkThread(sink, self._notice) for sink in sinks]

    def write(self, event: Event) -> None:
        """Hand an event to the sinks, unless it has no metrics or repeats a step."""
        if isinstance(event, MetricEvent) and self._is_new(event):
            stamped = event if event.time is not None else replace(event, time=time.time())
            for sink in self._sinks:
                sink.queue.put(stamped)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Wait until the sinks have written all events, for at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        for sink in self._sinks:
            sink.queue.put(None)
        for sink in self._sinks:
            sink.join(max(0.0, deadline - time.monotonic()))
            if sink.is_alive():
                self._notice(f"{sink.sink.name} did not take all numbers within {timeout_s:.0f} s of the end.")

    def _is_new(self, event: Event) -> bool:
        if not isinstance(event, MetricEvent) or event.step <= self._newest.get(event.name, 0):
            return False
        self._newest[event.name] = event.step
        return True


@contextlib.contextmanager
def metrics_of(
    config: TrainConfig, job: Path, *, earlier_events: Iterable[Event], notice: Callable[[str], None]
) -> Iterator[Metrics]:
    """Open the job's sinks for a `with` block; see `Metrics`."""
    metrics = Metrics(open_sinks(config, job), earlier_events=earlier_events, notice=notice)
    try:
        yield metrics
    finally:
        metrics.close()


class _SinkThread(threading.Thread):
    """Writes events from its `queue` to one sink until None arrives."""

    def __init__(self, sink: Sink, notice: Callable[[str], None]) -> None:
        super().__init__(name=f"metrics to {sink.name}", daemon=True)
        self.sink = sink
        self.queue: queue.SimpleQueue[MetricEvent | None] = queue.SimpleQueue()
        self._notice = notice
        self.start()

    def run(self) -> None:
        try:
            while (event := self.queue.get()) is not None:
                self.sink.write(event)
            self.sink.close()
        except Exception as error:  # noqa: BLE001 - whatever a library raises: training continues
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            self._notice(
                f"{self.sink.name} gets no more metrics: {reason}. Training continues; events.jsonl has all of them."
            )


def _require_package(module: str, package: str, key: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"{key} is set, but the package {package} is not installed where the job runs. Install it with "
            f"`pip install {package}`, or remove {key}."
        )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
