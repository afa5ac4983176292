"""Ray Train worker: runs a `TrainingRun` and connects it with the driver by events, heartbeats and commands."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from tandem.errors import TandemError
from tandem.observability.events import Event, LossSpikeReport, WorkersStopped
from tandem.train.anomalies import LossSpike, SkippedStep
from tandem.train.loop import CONTINUE, SAVE, STOP
from tandem.train.run import RankContext, RunHooks, TrainingRun, skipped_event
from tandem.train.supervision.heartbeat import HeartbeatThread, SpeedProbe
from tandem.train.supervision.outcome import Refused
from tandem.train.task import WorkerTask

PROBE_EVERY_S = 2.0
"""Seconds between measurements of a rank's own speed; each takes some milliseconds."""


def run_worker(settings: dict[str, Any]) -> None:
    """Run one rank of an attempt. Ray Train calls it in every worker, with {"task": WorkerTask}."""
    task: WorkerTask = settings["task"]
    rank = ray.train.get_context().get_world_rank()
    if ray.get(task.mailbox.fatal_error.remote()):
        # Ray Train has started the workers again after an error that would recur. The driver stops the run.
        return
    emit = _emitter(task.mailbox, rank)
    node = ray.get_runtime_context().get_node_id()
    heartbeats = HeartbeatThread(task.mailbox, rank=rank, node=node, every_s=task.config.faults.heartbeat_s)
    heartbeats.start()
    _install_sigterm_handler(heartbeats)
    try:
        TrainingRun(task, _rank_context(task, rank, emit, heartbeats)).run()
    except TandemError as error:
        ray.get(task.mailbox.report_fatal.remote(Refused(error=type(error).__name__, message=str(error))))
        raise
    except LossSpike as spike:
        report = LossSpikeReport(rows=spike.rows, loss=spike.loss, median=spike.median)
        emit(WorkersStopped(step=spike.step, spike=report))
    except Exception as error:
        heartbeats.error = f"{type(error).__name__}: {str(error)[:500]}"
        raise
    finally:
        # Events are sent without waiting; all must arrive before the process ends.
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(task.mailbox.flush.remote())
        heartbeats.close()


def _rank_context(
    task: WorkerTask, rank: int, emit: Callable[[Event], None], heartbeats: HeartbeatThread
) -> RankContext:
    torch.set_num_threads(1)
    device = ray.train.torch.get_device()

    def flush() -> None:
        if rank == 0:
            ray.get(task.mailbox.recorded.remote())

    return RankContext(
        rank=rank,
        device=device,
        nodes=_node_of_each_rank(),
        emit=emit,
        flush=flush,
        hooks=HeartbeatHooks(heartbeats, SpeedProbe(device, PROBE_EVERY_S), emit),
        evaluation_rows=None if task.evaluation is None else lambda: ray.get(task.evaluation),
    )


def _emitter(mailbox: Any, rank: int) -> Callable[[Event], None]:
    """Sends events of rank 0 without waiting. The ranks' events are the same."""
    return (lambda event: mailbox.put.remote(event)) if rank == 0 else (lambda event: None)


def _node_of_each_rank() -> list[str]:
    own_node: str = ray.get_runtime_context().get_node_id()
    nodes = [own_node]
    if dist.is_initialized():
        nodes *= dist.get_world_size()
        dist.all_gather_object(nodes, own_node)
    return nodes


class HeartbeatHooks(RunHooks):
    """Loop hooks of a rank: its state goes out with its heartbeats, and the driver's commands come back."""

    def __init__(self, heartbeats: HeartbeatThread, probe: SpeedProbe, emit: Callable[[Event], None]) -> None:
        self._heartbeats, self._probe, self._emit = heartbeats, probe, emit
        self._saved_request = 0

    def poll_request(self) -> int:
        """See `LoopHooks`."""
        commands = self._heartbeats.commands
        if commands.stop:
            return STOP
        if commands.save_request > self._saved_request:
            self._saved_request = commands.save_request
            return SAVE
        return CONTINUE

    def on_phase(self, phase: str, step: int) -> None:
        """See `LoopHooks`."""
        self._heartbeats.enter_phase(phase, step)
        if phase == "step":
            self._heartbeats.record(compute_s=self._probe())

    def on_data_wait(self, seconds: float) -> None:
        """See `LoopHooks`."""
        super().on_data_wait(seconds)
        self._heartbeats.record(data_s=seconds)

    def on_skipped_step(self, skipped: SkippedStep) -> None:
        """See `LoopHooks`."""
        self._emit(skipped_event(skipped))


_HEARTBEAT_THREADS: list[HeartbeatThread] = []
"""The heartbeat thread of the worker in this process: SIGTERM sets its stop reason."""


def _install_sigterm_handler(heartbeats: HeartbeatThread) -> None:
    # Only the main thread can set a handler. That thread is Ray's, and runs the actor's queued calls once this one waits.
    _HEARTBEAT_THREADS[:] = [heartbeats]
    ray.get_runtime_context().current_actor.execute.remote(_set_handler)


def _set_handler() -> None:
    def handle_sigterm(*_: object) -> None:
        for heartbeats in _HEARTBEAT_THREADS:
            if heartbeats.stop_reason or not heartbeats.is_alive():
                # A second signal means now, and a worker that does not train has nothing to save.
                sys.exit(128 + signal.SIGTERM)
            heartbeats.stop_reason = f"rank {heartbeats.rank} was sent SIGTERM"

    signal.signal(signal.SIGTERM, handle_sigterm)
