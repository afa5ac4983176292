"""What each training process runs under Ray Train: model on the mesh, resume, loop, checkpoints, export."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from tandem.checkpoint import folders
from tandem.checkpoint.export import export
from tandem.checkpoint.folders import SavedState
from tandem.checkpoint.sharded import Checkpoints
from tandem.config import DpoConfig, TrainConfig
from tandem.data.build import tokenizer_files
from tandem.data.stream import Stream, rows_behind
from tandem.data.tokenize import TextEncoder
from tandem.errors import StorageError, TandemError
from tandem.registry import restore
from tandem.train.adapters.lora import add_adapters
from tandem.train.adapters.quantize import load_nf4
from tandem.train.anomalies import LossSpike, SkippedStep
from tandem.train.ema import Ema
from tandem.train.loop import CONTINUE, SAVE, STOP, LoopHooks, LoopState, StepReport, train
from tandem.train.model import build_model, count_parameters
from tandem.train.objectives.dpo import AdapterDisabledReference, Dpo, FrozenReference
from tandem.train.objectives.evaluate import evaluate
from tandem.train.objectives.objective import NextToken, Objective
from tandem.train.parallel.mesh import Degrees
from tandem.train.parallel.model import ParallelModel
from tandem.train.parallel.sharded_load import build_empty_model, load_weights, to_meta
from tandem.train.parallel.strategy import parallelize_for_training, parallelize_frozen
from tandem.train.precision import LossScaler, use_float8
from tandem.train.recompute import recompute_activations
from tandem.train.reporting.flops import MfuMeter
from tandem.train.storage_retry import retry_storage
from tandem.train.supervision.health import HeartbeatThread, SpeedProbe

Emit = Callable[[dict[str, Any]], None]

PROBE_EVERY_S = 2.0
"""Seconds between measurements of a rank's own speed; each takes some milliseconds."""


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """Everything a worker needs to know; pickled into each."""

    config: TrainConfig
    job: Path
    """The job's folder."""
    base: Path | None
    """Folder of the base model."""
    base_id: str | None
    reference: Path | None
    """Folder of the model that dpo compares with; None with adapters that are compared with their base."""
    tokenizer: Path
    stream: Stream
    evaluation: Any
    """Object reference of the rows to evaluate on, or None."""
    mailbox: Any = None
    """Actor that takes events (see `tandem.train.supervision.mailbox`); each attempt has its own."""
    skip: tuple[tuple[int, int], ...] = ()
    """Rows that are left out, each from the first to the one after the last: those of a loss that jumped."""


def run_worker(settings: dict[str, Any]) -> None:
    """Train, save and export one job, or a part of it. Ray Train calls it in every worker."""
    task: WorkerTask = settings["task"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    # A fault that a second try would meet again has been told to the driver: nothing to do here.
    if ray.get(task.mailbox.fatal_error.remote()):
        return
    emit: Emit = (lambda event: task.mailbox.put.remote(event)) if rank == 0 else (lambda event: None)
    here = ray.get_runtime_context()
    heartbeat_thread = HeartbeatThread(
        task.mailbox, rank=rank, node=here.get_node_id(), every_s=task.config.faults.heartbeat_s
    )
    heartbeat_thread.start()
    _install_sigterm_handler(heartbeat_thread)
    try:
        _run(task, rank, context.get_world_size(), emit, heartbeat_thread)
    except TandemError as error:
        ray.get(task.mailbox.report_fatal.remote(type(error).__name__, str(error), error.exit_code))
        raise
    except LossSpike as spike:
        emit(
            {
                "event": "left",
                "step": spike.step,
                "spike": {"rows": spike.rows, "loss": spike.loss, "median": spike.median},
            }
        )
    except Exception as error:
        heartbeat_thread.error = f"{type(error).__name__}: {str(error)[:500]}"
        raise
    finally:
        # Events are sent without waiting; they are all there before the process may go.
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(task.mailbox.flush.remote())
        heartbeat_thread.close()


_ACTIVE: list[HeartbeatThread] = []
"""The heartbeat_thread of the worker in this process, which SIGTERM is told to."""


def _install_sigterm_handler(heartbeat_thread: HeartbeatThread) -> None:
    # A handler can be set in the main thread only, and that is Ray's: it runs the actor's queued calls once this thread waits.
    _ACTIVE[:] = [heartbeat_thread]
    ray.get_runtime_context().current_actor.execute.remote(_set_handler)


def _set_handler() -> None:
    def on_sigterm(*_: object) -> None:
        for heartbeat_thread in _ACTIVE:
            if heartbeat_thread.stop_reason or not heartbeat_thread.is_alive():
                # Twice means now, and what has nothing to save goes at once.
                sys.exit(128 + signal.SIGTERM)
            heartbeat_thread.stop_reason = f"rank {heartbeat_thread.rank} was sent SIGTERM"

    signal.signal(signal.SIGTERM, on_sigterm)


class HeartbeatHooks(LoopHooks):
    """What one rank's loop tells the driver, by its heartbeat_thread, and what the driver wants of it."""

    def __init__(self, heartbeat_thread: HeartbeatThread, probe: SpeedProbe, emit: Emit) -> None:
        self._heartbeat_thread, self._probe, self._emit = heartbeat_thread, probe, emit
        self._saved = 0
        self.waited_s = 0.0
        """Time that the training steps have waited for rows."""

    def poll_request(self) -> int:
        """See `LoopHooks`."""
        if self._heartbeat_thread.order.get("leave"):
            return STOP
        stop_request = int(self._heartbeat_thread.order.get("save", 0))
        if stop_request > self._saved:
            self._saved = stop_request
            return SAVE
        return CONTINUE

    def on_phase(self, phase: str, step: int) -> None:
        """See `LoopHooks`."""
        self._heartbeat_thread.enter_phase(phase, step)
        if phase == "step":
            self._heartbeat_thread.record(compute_s=self._probe())

    def on_data_wait(self, seconds: float) -> None:
        """See `LoopHooks`."""
        self.waited_s += seconds
        self._heartbeat_thread.record(data_s=seconds)

    def on_skipped_step(self, skipped: SkippedStep) -> None:
        """See `LoopHooks`."""
        self._emit({"event": "skipped", **asdict(skipped), "reason": f"not finite: {skipped.describe()}"})


def _run(task: WorkerTask, rank: int, world: int, emit: Emit, heartbeat_thread: HeartbeatThread) -> None:
    config = task.config
    torch.set_num_threads(1)
    device = ray.train.torch.get_device()
    degrees = Degrees.of(config.parallel)
    for folder in (task.base, task.reference):
        if folder is not None:
            # A model of the hub, on a node whose home is not the one where it was downloaded.
            restore(folder)
    encoder = TextEncoder(str(task.tokenizer))

    # StopRequest before the model is read, which may take long.
    nodes = _nodes(world)
    degrees.check_nodes(nodes)
    empty = build_empty_model(config, task.base) if task.base is not None else None
    if empty is not None:
        built = empty
    elif config.lora is not None and config.lora.quantize is not None and task.base is not None:
        built = load_nf4(task.base, config.precision, device)
    else:
        built = build_model(config.model, task.base, encoder, config.seed)
    if config.lora is not None:
        built = add_adapters(built, config.lora, base_id=task.base_id or str(task.base), seed=config.seed)
    total, trainable = count_parameters(built)
    meter = MfuMeter.of(
        built,
        device=device,
        workers=world,
        sequence_length=config.data.sequence_length,
        precision=config.precision,
    )
    built = recompute_activations(built, config.recompute)
    if config.precision == "float8":
        built = use_float8(built)
    # Sharding comes last: it groups the parameters that finally exist.
    adapters = to_meta(built) if empty is not None else {}
    model, optimizer = parallelize_for_training(built, degrees.mesh(device.type, world), config, device)
    if empty is not None and task.base is not None:
        load_weights(model, task.base, adapters, device)
    objective = _objective(task, encoder, model, device)
    ema = Ema(model, config.ema) if config.ema is not None else None
    scaler = LossScaler() if config.precision == "float16" else None
    extra = {name: thing for name, thing in (("ema", ema), ("scaler", scaler)) if thing is not None}
    # Tensor peers drop out the same: what they compute between the matrix products is the same.
    torch.manual_seed(config.seed + 1 + rank // degrees.tp)

    def notice(message: str) -> None:
        emit({"event": "notice", "message": message})

    root = folders.checkpoints_root(config.checkpoint, task.job)
    checkpoints = Checkpoints(
        root, keep=config.checkpoint.keep, best=config.checkpoint.best, asynchronous=config.checkpoint.asynchronous
    )
    found, damaged = checkpoints.load(model, optimizer, extra=extra)
    state = LoopState()
    if found:
        state = LoopState(step=found.step, tokens=found.tokens, rows=rows_behind(found.cursor))
    last_loss = found.loss if found else None
    measured: tuple[int, dict[str, float]] = (0, {})
    refused = False
    for message in damaged:
        notice(message)
    emit(
        {
            "event": "started", "job": task.job.name, "kind": _kind(task),
            "workers": world, "nodes": len(set(nodes)), "layout": config.parallel.layout,
            "parameters": total, "trainable": trainable, "steps": config.steps, "resumed_from": found.step if found else None,
        }
    )  # fmt: skip

    overseen, before = HeartbeatHooks(heartbeat_thread, SpeedProbe(device, PROBE_EVERY_S), emit), (0.0, 0.0)

    def report(step: StepReport) -> None:
        nonlocal last_loss, before
        last_loss = step.loss
        now = step.seconds, overseen.waited_s
        waited = {"data_wait": (now[1] - before[1]) / max(1e-9, now[0] - before[0])}
        before = now
        emit({"event": "step", "steps": config.steps, **asdict(step), **meter.read(step.tokens_per_s), **waited})

    def save(now: LoopState) -> None:
        saved = SavedState(
            step=now.step,
            tokens=now.tokens,
            loss=last_loss,
            world=world,
            cursor=rows.cursor(),
            metrics={
                **({} if last_loss is None else {"loss": last_loss}),
                **(measured[1] if measured[0] == now.step else {}),
            },
        )
        if rank == 0:
            # What a run that goes on from here will not tell again has to be told before.
            ray.get(task.mailbox.flush.remote())

        def write() -> None:
            nonlocal refused
            try:
                checkpoints.save(
                    model, optimizer, saved, extra=extra,
                    on_commit=lambda path: emit({"event": "checkpoint", "step": saved.step, "path": str(path)}),
                )  # fmt: skip
                if refused:
                    # What is written in the background tells of a failure when the next one begins: too late for two in a row.
                    checkpoints.wait()
            except StorageError:
                refused = True
                raise
            refused = False

        retry_storage(
            write,
            limit_s=config.faults.storage_retry_s,
            give_up=lambda: isinstance(root, Path) and root.is_file(),
            tell=notice,
        )

    def sync_tied() -> None:
        """See that the last checkpoint is whole."""
        nonlocal refused
        try:
            checkpoints.wait()
        except StorageError:
            refused = True
            save(state)

    def averaged() -> AbstractContextManager[None]:
        return ema.swapped(model) if ema else contextlib.nullcontext()

    def measure(step: int) -> None:
        nonlocal measured
        held = ray.get(task.evaluation)
        share = config.batch_size // degrees.data_parallel // config.accumulate
        with averaged():
            evaluated = evaluate(
                model, objective, held, batch_rows=share, device=device, precision=config.precision,
            )  # fmt: skip
        measured = (step, {f"evaluation_{name}": value for name, value in evaluated.items()})
        emit({"event": "evaluation", "step": step, "rows": len(held), "averaged": ema is not None, **evaluated})

    if state.step < config.steps:
        rows = task.stream.rows(
            degrees.data_rank(rank),
            degrees.data_parallel,
            found.cursor if found else None,
            process=(rank, world),
            tell=notice,
        )
        with contextlib.closing(rows):
            for first, end in task.skip:
                if first <= state.rows < end:
                    rows.skip(end - state.rows)
                    state.rows = end
            try:
                ended = train(
                    model, optimizer, rows, config, state, report=report, save=save, device=device,
                    objective=objective, ema=ema, scaler=scaler, evaluate=measure if task.evaluation is not None else None,
                    hooks=overseen,
                )  # fmt: skip
            except LossSpike:
                with contextlib.suppress(StorageError):
                    checkpoints.wait()
                raise
            sync_tied()
        if not ended:
            model.close()
            emit({"event": "left", "step": state.step})
            return
    heartbeat_thread.enter_phase("export", state.step)
    with averaged():
        export(model.whole, model.weights(), task.job / "export", beside=tokenizer_files(task.tokenizer))
    if dist.is_initialized():
        dist.barrier()
    model.close()
    emit({"event": "exported", "loss": last_loss, "step": state.step, "tokens": state.tokens})


def _nodes(world: int) -> list[str]:
    """The node that Ray has put each rank on."""
    mine: str = ray.get_runtime_context().get_node_id()
    nodes = [mine] * world
    if dist.is_initialized():
        dist.all_gather_object(nodes, mine)
    return nodes


def _kind(task: WorkerTask) -> str:
    return "dpo" if task.config.objective == "dpo" else "sft" if task.base else "pretrain"


def _objective(task: WorkerTask, encoder: TextEncoder, model: ParallelModel, device: torch.device) -> Objective:
    config = task.config
    if config.objective == "next_token":
        return NextToken(model.share)
    chosen = config.dpo or DpoConfig()
    if task.reference is None:
        return Dpo(chosen, AdapterDisabledReference())
    empty = build_empty_model(config, task.reference)
    reference = empty if empty is not None else build_model(config.model, task.reference, encoder, config.seed)
    adapters = to_meta(reference) if empty is not None else {}
    frozen = parallelize_frozen(reference.requires_grad_(False), model.mesh, config, device)
    if empty is not None:
        load_weights(frozen, task.reference, adapters, device)
    return Dpo(chosen, FrozenReference(frozen))
