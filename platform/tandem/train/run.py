"""A training run on one rank: build, restore, train with evaluations and saves, export. Knows torch, not Ray."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tandem.checkpoint import folders
from tandem.checkpoint.export import export
from tandem.checkpoint.folders import SavedState
from tandem.checkpoint.sharded import Checkpoints
from tandem.config import DpoConfig
from tandem.data.build import tokenizer_files
from tandem.data.packing import Rows
from tandem.data.stream import StreamRows, rows_consumed
from tandem.data.tokenize import TextEncoder
from tandem.errors import StorageError
from tandem.observability.events import (
    CheckpointExported,
    CheckpointSaved,
    Evaluated,
    Event,
    Exported,
    Notice,
    Started,
    Step,
    StepSkipped,
    WorkersStopped,
)
from tandem.registry import restore as restore_hub_files
from tandem.storage import located
from tandem.train.adapters.lora import add_adapters
from tandem.train.adapters.quantize import load_nf4
from tandem.train.anomalies import LossSpike, SkippedStep
from tandem.train.checkpointing import RetryingCheckpoints
from tandem.train.ema import Ema
from tandem.train.loop import LoopHooks, LoopState, StepReport, train
from tandem.train.model.build import build_model, count_parameters
from tandem.train.model.precision import LossScaler, use_float8
from tandem.train.model.recompute import recompute_activations
from tandem.train.objectives.dpo import AdapterDisabledReference, Dpo, FrozenReference
from tandem.train.objectives.evaluate import evaluate
from tandem.train.objectives.objective import NextToken, Objective
from tandem.train.parallel.mesh import Degrees
from tandem.train.parallel.model import ParallelModel
from tandem.train.parallel.sharded_load import build_empty_model, load_weights, to_meta
from tandem.train.parallel.strategy import parallelize_for_training, parallelize_frozen
from tandem.train.reporting.flops import MfuMeter
from tandem.train.task import WorkerTask

CHECKPOINT_EXPORTS = "exports"
"""Folder of a job with the exports of its checkpoints."""


@dataclass(frozen=True, kw_only=True)
class RankContext:
    """The rank, its device, and its connection with the driver."""

    rank: int
    device: torch.device
    nodes: list[str]
    """Node of each rank; its length is the world size."""
    emit: Callable[[Event], None]
    """Sends an event to the driver; does nothing on ranks other than 0."""
    flush: Callable[[], None]
    """Returns when the driver has recorded all events."""
    hooks: RunHooks
    evaluation_rows: Callable[[], Rows] | None
    """Loads the rows to evaluate on; None without evaluation."""


class RunHooks(LoopHooks):
    """The loop's hooks, with the time that steps have waited for rows."""

    data_wait_s: float = 0.0

    def on_data_wait(self, seconds: float) -> None:
        """See `LoopHooks`."""
        self.data_wait_s += seconds


class TrainingRun:
    """One attempt at a training job on one rank. All ranks call the same methods in the same order."""

    model: ParallelModel
    optimizer: torch.optim.Optimizer
    objective: Objective
    ema: Ema | None
    scaler: LossScaler | None
    checkpoints: RetryingCheckpoints
    rows: StreamRows

    def __init__(self, task: WorkerTask, context: RankContext) -> None:
        self.task, self.config, self.context = task, task.config, context
        self.world = len(context.nodes)
        self.degrees = Degrees.of(task.config.parallel)
        self.state = LoopState()
        self._restored: SavedState | None = None
        self._last_loss: float | None = None
        self._evaluated: tuple[int, dict[str, float]] = (0, {})
        """Step and result of the last evaluation."""
        self._reported: tuple[float, float] = (0.0, 0.0)
        """Seconds of training, and of waiting for rows, at the last report."""

    def run(self) -> None:
        """Build, restore, train and export. Emits Exported at the end, or WorkersStopped if the driver stops it before."""
        self.build()
        self.restore()
        finished = self.state.step >= self.config.steps or self.train()
        if finished:
            self.export()
        self.model.close()
        if finished:
            event: Event = Exported(loss=self._last_loss, step=self.state.step, tokens=self.state.tokens)
        else:
            event = WorkersStopped(step=self.state.step)
        self.context.emit(event)

    # ---- build -----------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Make the model with its optimizer and objective, sharded over the mesh."""
        config, context = self.config, self.context
        # Before the model is read, which may take long.
        self.degrees.check_nodes(context.nodes)
        for folder in (self.task.base, self.task.reference):
            if folder is not None:
                # This node's home may lack a hub model that was downloaded on another node.
                restore_hub_files(folder)
        encoder = TextEncoder(str(self.task.tokenizer))
        model, empty = self._load_model(encoder)
        self._parameters, self._trainable = count_parameters(model)
        self._meter = MfuMeter.of(
            model,
            device=context.device,
            workers=self.world,
            sequence_length=config.data.sequence_length,
            precision=config.precision,
        )
        model = recompute_activations(model, config.recompute)
        if config.precision == "float8":
            model = use_float8(model)
        # Sharding comes last: it groups the parameters that finally exist.
        adapters = to_meta(model) if empty else {}
        mesh = self.degrees.mesh(context.device.type, self.world)
        self.model, self.optimizer = parallelize_for_training(model, mesh, config, context.device)
        if empty and self.task.base is not None:
            load_weights(self.model, self.task.base, adapters, context.device)
        self.objective = self._build_objective(encoder)
        self.ema = Ema(self.model, config.ema) if config.ema is not None else None
        self.scaler = LossScaler() if config.precision == "float16" else None
        # The same dropout on tensor peers, which compute the same between the matrix products.
        torch.manual_seed(config.seed + 1 + context.rank // self.degrees.tp)

    def _load_model(self, encoder: TextEncoder) -> tuple[nn.Module, bool]:
        """The model with its adapters before it is sharded, and whether its weights are still to be loaded."""
        config, base = self.config, self.task.base
        empty = build_empty_model(config, base) if base is not None else None
        if empty is not None:
            model = empty
        elif config.lora is not None and config.lora.quantize is not None and base is not None:
            model = load_nf4(base, config.precision, self.context.device)
        else:
            model = build_model(config.model, base, encoder, config.seed)
        if config.lora is not None:
            model = add_adapters(model, config.lora, base_id=self.task.base_id or str(base), seed=config.seed)
        return model, empty is not None

    def _build_objective(self, encoder: TextEncoder) -> Objective:
        config, device, folder = self.config, self.context.device, self.task.reference
        if config.objective == "next_token":
            return NextToken(self.model.shard_sequence)
        dpo = config.dpo or DpoConfig()
        if folder is None:
            return Dpo(dpo, AdapterDisabledReference())
        empty = build_empty_model(config, folder)
        reference = empty if empty is not None else build_model(config.model, folder, encoder, config.seed)
        adapters = to_meta(reference) if empty is not None else {}
        frozen = parallelize_frozen(reference.requires_grad_(False), self.model.mesh, config, device)
        if empty is not None:
            load_weights(frozen, folder, adapters, device)
        return Dpo(dpo, FrozenReference(frozen))

    # ---- restore ---------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Load the newest intact checkpoint, if there is one. Emits Started."""
        config, task = self.config, self.task
        root = folders.checkpoints_root(config.checkpoint, task.job)
        self.checkpoints = RetryingCheckpoints(
            Checkpoints(
                root,
                keep=config.checkpoint.keep,
                best=config.checkpoint.best,
                asynchronous=config.checkpoint.asynchronous,
            ),
            limit_s=config.faults.storage_retry_s,
            notify=self._notify,
        )
        restored, damage_messages = self.checkpoints.load(self.model, self.optimizer, extra=self._extra_state())
        if restored is None and config.extends is not None:
            restored = self.checkpoints.load_from(
                located(config.extends.checkpoint), self.model, self.optimizer, extra=self._extra_state()
            )
        if restored is not None:
            self.state = LoopState(step=restored.step, tokens=restored.tokens, rows=rows_consumed(restored.cursor))
            self._last_loss = restored.loss
        self._restored = restored
        for message in damage_messages:
            self._notify(message)
        self.context.emit(
            Started(
                job=task.job.name,
                kind=task.kind,
                workers=self.world,
                nodes=len(set(self.context.nodes)),
                layout=config.parallel.layout,
                parameters=self._parameters,
                trainable=self._trainable,
                steps=config.steps,
                resumed_from=restored.step if restored is not None else None,
            )
        )

    def _extra_state(self) -> dict[str, Any]:
        """State in a checkpoint beside model and optimizer."""
        extra = {"ema": self.ema, "scaler": self.scaler}
        return {name: part for name, part in extra.items() if part is not None}

    def _notify(self, message: str) -> None:
        self.context.emit(Notice(message=message))

    # ---- train -----------------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Train to the last step; False if the driver stopped it before. The last checkpoint is complete then.

        Raises LossSpike if the loss jumped and the config says that the run goes back.
        """
        with contextlib.closing(self._open_rows()) as self.rows:
            try:
                finished = train(
                    self.model,
                    self.optimizer,
                    self.rows,
                    self.config,
                    self.state,
                    report=self.report,
                    save=self.save,
                    device=self.context.device,
                    objective=self.objective,
                    ema=self.ema,
                    scaler=self.scaler,
                    evaluate=self.evaluate if self.context.evaluation_rows is not None else None,
                    hooks=self.context.hooks,
                )
            except LossSpike:
                with contextlib.suppress(StorageError):
                    self.checkpoints.wait()
                raise
            try:
                self.checkpoints.wait()
            except StorageError:
                self.save(self.state)
        return finished

    def _open_rows(self) -> StreamRows:
        """This rank's rows, from those that follow the checkpoint on, without those to skip."""
        rows = self.task.stream.rows(
            self.degrees.data_rank(self.context.rank),
            self.degrees.data_parallel,
            self._restored.cursor if self._restored is not None else None,
            process=(self.context.rank, self.world),
            notify=self._notify,
        )
        for first, end in self.task.skipped_rows:
            if first <= self.state.rows < end:
                rows.skip(end - self.state.rows)
                self.state.rows = end
        return rows

    def report(self, step: StepReport) -> None:
        """Emit the report of a step."""
        self._last_loss = step.loss
        current = step.seconds, self.context.hooks.data_wait_s
        previous, self._reported = self._reported, current
        utilization = self._meter.read(step.tokens_per_s)
        self.context.emit(
            Step(
                steps=self.config.steps,
                data_wait=(current[1] - previous[1]) / max(1e-9, current[0] - previous[0]),
                **asdict(step),
                mfu=utilization.mfu,
                memory_bytes=utilization.memory_bytes,
            )
        )

    def evaluate(self, step: int) -> None:
        """Evaluate the model, or the average of its weights if there is one. Emits Evaluated."""
        assert self.context.evaluation_rows is not None, "the loop evaluates only if there are rows"
        rows, config = self.context.evaluation_rows(), self.config
        with self._averaged_weights():
            metrics = evaluate(
                self.model,
                self.objective,
                rows,
                batch_rows=config.batch_size // self.degrees.data_parallel // config.accumulate,
                device=self.context.device,
                precision=config.precision,
            )
        self._evaluated = (step, {f"evaluation_{name}": value for name, value in metrics.items()})
        self.context.emit(Evaluated(step=step, rows=len(rows), averaged=self.ema is not None, measured=metrics))

    def save(self, state: LoopState) -> None:
        """Save a checkpoint of the current step; retried while the storage refuses it."""
        metrics = {} if self._last_loss is None else {"loss": self._last_loss}
        step, evaluated = self._evaluated
        if step == state.step:
            metrics |= evaluated
        saved = SavedState(
            step=state.step,
            tokens=state.tokens,
            loss=self._last_loss,
            world=self.world,
            cursor=self.rows.cursor(),
            metrics=metrics,
        )
        # A run that resumes from this checkpoint does not repeat the events before it.
        self.context.flush()
        self.checkpoints.save(
            self.model,
            self.optimizer,
            saved,
            extra=self._extra_state(),
            on_commit=lambda path: self.context.emit(CheckpointSaved(step=saved.step, path=str(path))),
        )
        # At the last step the result itself is exported.
        if self.config.checkpoint.exports and state.step < self.config.steps:
            self._export_checkpoint(state.step, evaluated if step == state.step else None)

    def _export_checkpoint(self, step: int, evaluation: Mapping[str, float] | None) -> None:
        """Export the weights of this step to a folder of its own. A full disk ends no run: the next checkpoint tries again."""
        folder = self.task.job / CHECKPOINT_EXPORTS / f"step-{step:08d}"
        try:
            self._export_to(folder)
        except StorageError as error:
            self._notify(f"The checkpoint of step {step} could not be exported: {error}")
            return
        self.context.emit(CheckpointExported(step=step, path=str(folder), loss=self._last_loss, evaluation=evaluation))

    def _averaged_weights(self) -> AbstractContextManager[None]:
        return self.ema.swapped(self.model) if self.ema is not None else contextlib.nullcontext()

    # ---- export ----------------------------------------------------------------------------------------------------

    def export(self) -> None:
        """Write the weights, or their average, to the job's folder in Hugging Face or peft format."""
        self.context.hooks.on_phase("export", self.state.step)
        self._export_to(self.task.job / "export")

    def _export_to(self, folder: Path) -> None:
        """Write the weights, or their average, to a folder; returns on every rank when it is there."""
        with self._averaged_weights():
            export(self.model.whole, self.model.weights(), folder, extra_files=tokenizer_files(self.task.tokenizer))
        if dist.is_initialized():
            dist.barrier()


def skipped_event(skipped: SkippedStep) -> StepSkipped:
    """The event of a step that was not taken."""
    return StepSkipped(**asdict(skipped), reason=f"not finite: {skipped.describe()}")
