"""What each training process runs under Ray Train: model on the mesh, resume, loop, checkpoints, export."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from tandem.checkpoint import folders, sharded
from tandem.checkpoint.export import export
from tandem.checkpoint.folders import SavedState
from tandem.config import TrainConfig
from tandem.data.build import tokenizer_files
from tandem.data.stream import Stream
from tandem.data.tokenize import TextEncoder
from tandem.errors import TandemError
from tandem.train.loop import LoopState, StepReport, train
from tandem.train.lora import add_adapters
from tandem.train.mesh import Degrees
from tandem.train.model import build_model, count_parameters, distribute

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """Everything a worker needs to know; pickled into each."""

    config: TrainConfig
    job: Path
    """The job's folder."""
    base: Path | None
    """Folder of the base model."""
    base_id: str | None
    tokenizer: Path
    stream: Stream
    mailbox: Any
    """Actor that takes events (see `tandem.train.mailbox`)."""


def run_worker(settings: dict[str, Any]) -> None:
    """Train, save and export one job. Ray Train calls it in every worker, again after a failure."""
    task: WorkerTask = settings["task"]
    context = ray.train.get_context()
    # A fault that a second try would meet again has been told to the driver: nothing to do here.
    if ray.get(task.mailbox.failed.remote()):
        return
    emit: Emit = (
        (lambda event: task.mailbox.put.remote(event)) if context.get_world_rank() == 0 else (lambda event: None)
    )
    try:
        _run(task, context.get_world_rank(), context.get_world_size(), emit)
    except TandemError as error:
        ray.get(task.mailbox.fail.remote(type(error).__name__, str(error), error.exit_code))
        raise
    finally:
        # Events are sent without waiting; they are all there before the process may go.
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(task.mailbox.flush.remote())


def _run(task: WorkerTask, rank: int, world: int, emit: Emit) -> None:
    config = task.config
    torch.set_num_threads(1)
    device = ray.train.torch.get_device()
    degrees = Degrees.of(config.parallel)
    encoder = TextEncoder(str(task.tokenizer))

    model = build_model(config.model, task.base, encoder, config.seed)
    if config.lora is not None:
        model = add_adapters(model, config.lora, base_id=task.base_id or str(task.base), seed=config.seed)
    total, trainable = count_parameters(model)
    # Sharding comes last: it groups the parameters that finally exist.
    model = distribute(model.to(device), degrees.mesh(device.type, world), precision=config.precision)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        weight_decay=config.optimizer.weight_decay,
    )
    torch.manual_seed(config.seed + 1 + rank)

    root = task.job / "checkpoints"
    newest = folders.latest(root)
    found = sharded.load(newest, model, optimizer) if newest else None
    state = LoopState(step=found.step, tokens=found.tokens) if found else LoopState()
    last_loss = found.loss if found else None
    emit(
        {
            "event": "started", "job": task.job.name, "kind": "sft" if task.base else "pretrain",
            "workers": world, "strategy": config.parallel.strategy, "parameters": total, "trainable": trainable,
            "steps": config.steps, "resumed_from": found.step if found else None,
        }
    )  # fmt: skip

    def report(step: StepReport) -> None:
        nonlocal last_loss
        last_loss = step.loss
        emit({"event": "step", "steps": config.steps, **asdict(step)})

    def save(now: LoopState) -> None:
        saved = SavedState(
            step=now.step,
            tokens=now.tokens,
            loss=last_loss,
            world=world,
            cursor=task.stream.cursor(now.step * config.batch_size),
        )
        path = sharded.save(root, model, optimizer, saved, keep=config.checkpoint.keep)
        emit({"event": "checkpoint", "step": now.step, "path": str(path)})

    if state.step < config.steps:
        rows = task.stream.rows(degrees.data_rank(rank), degrees.data_parallel, found.cursor if found else None)
        train(
            model, optimizer, rows, config, state, ranks=degrees.data_parallel, report=report, save=save, device=device
        )
    export(model, task.job / "export", beside=tokenizer_files(task.tokenizer))
    if dist.is_initialized():
        dist.barrier()
    emit({"event": "exported", "loss": last_loss, "step": state.step})
