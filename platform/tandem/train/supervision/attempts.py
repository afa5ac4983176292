"""Attempts to run a job's workers under Ray Train: one after another, until the restart policy stops or the result is exported.

One attempt is one run of Ray Train with a fixed number of workers and without retries. `policy.decide` chooses what follows.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.train.torch
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.config import FailureConfig, RunConfig

from tandem.checkpoint import folders
from tandem.cluster.health.cordons import placement_selector
from tandem.config import TrainConfig, with_workers, worker_counts
from tandem.data.stream import rows_consumed
from tandem.observability.events import CheckpointExported, Exported, FaultDetected, Notice, RolledBack
from tandem.observability.journal import Journal
from tandem.train.reporting.metrics import Metrics
from tandem.train.storage_retry import wait_for_storage
from tandem.train.supervision import health
from tandem.train.supervision.capacity import current_nodes, max_workers
from tandem.train.supervision.heartbeat import Heartbeat
from tandem.train.supervision.history import RunHistory
from tandem.train.supervision.mailbox import open_mailbox
from tandem.train.supervision.node_health import cordon_bad_nodes
from tandem.train.supervision.outcome import Completed, Fault, Faulted, NoCapacity, Outcome, Refused, last_line
from tandem.train.supervision.policy import Decision, Resize, Restart, SkipRows, Stop, decide, updated_history
from tandem.train.supervision.processes import find_lost_nodes, kill_workers
from tandem.train.supervision.recorder import EventRecorder
from tandem.train.supervision.stop_request import StopRequest
from tandem.train.supervision.watch import Supervision, watching
from tandem.train.task import WorkerTask

WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""One intra-op thread a process: oversubscribed threads were 3 to 14 times slower (facts.md)."""

CAPACITY_TIMEOUT_S = 30.0
"""Seconds at most that an elastic run waits for the resources of its old workers, before it continues with fewer."""


def run_workers(
    task: WorkerTask,
    journal: Journal,
    metrics: Metrics,
    stop_request: StopRequest | None = None,
    *,
    on_exported: Callable[[Exported], None] = lambda exported: None,
    on_checkpoint_exported: Callable[[CheckpointExported], None] = lambda exported: None,
) -> Exported:
    """Run the workers until they have exported the result. `on_exported`, `on_checkpoint_exported`: see `Supervision`.

    Raises errors that another attempt would meet again, JobError after too many faults without a new checkpoint, and JobStopped
    after `stop_request`.
    """
    # Not `or`: a StopRequest is false until it is set.
    stop_request = StopRequest() if stop_request is None else stop_request
    recorder = EventRecorder(journal, metrics)
    supervision = Supervision(
        config=task.config,
        recorder=recorder,
        stop_request=stop_request,
        on_exported=on_exported,
        on_checkpoint_exported=on_checkpoint_exported,
    )
    history = RunHistory.of(task.config, journal.read())
    while True:
        outcome = run_attempt(_next_task(task, history, restarted=recorder.starts > 0), supervision)
        if isinstance(outcome, Completed):
            return outcome.exported
        if isinstance(outcome, Faulted):
            cordon_bad_nodes(recorder.journal)
        if not isinstance(outcome, Refused):
            history = _history_with_checkpoint(task, history, supervision)
        decision = decide(outcome, history)
        history = updated_history(decision, history)
        _record_decision(decision, history, recorder)
        if isinstance(decision, Stop):
            raise decision.error


def _next_task(task: WorkerTask, history: RunHistory, *, restarted: bool) -> WorkerTask:
    """The task of the next attempt, with the number of workers that the cluster has room for."""
    config = task.config
    workers = config.parallel.workers
    if len(worker_counts(config)) > 1:
        workers = _wait_for_capacity(config, restarted=restarted)
    return replace(
        task, config=with_workers(config, workers), mailbox=open_mailbox(), skipped_rows=history.skipped_rows
    )


def _history_with_checkpoint(task: WorkerTask, history: RunHistory, supervision: Supervision) -> RunHistory:
    """The history with the newest checkpoint and the newest step; waits while the checkpoints cannot be read."""
    root = folders.checkpoints_root(task.config.checkpoint, task.job)
    wait_for_storage(root, supervision.recorder.journal, task.config.faults.storage_retry_s)
    newest = folders.latest(root)
    state = folders.read_state(newest) if newest else None
    return replace(
        history,
        last_step=supervision.recorder.last_step,
        checkpoint_step=state.step if state else None,
        checkpoint_rows=rows_consumed(state.cursor) if state else 0,
        stop_requested=bool(supervision.stop_request),
    )


def _record_decision(decision: Decision, history: RunHistory, recorder: EventRecorder) -> None:
    """Write the events of a decision."""
    match decision:
        case Restart(fault) | Stop(fault=Fault() as fault):
            recorder.restart_reason = fault.reason
            recorder.journal.write(
                FaultDetected(kind=fault.kind, rank=fault.rank, reason=fault.reason, step=history.last_step)
            )
        case SkipRows():
            recorder.restart_reason = "a loss that jumped"
            recorder.journal.write(
                RolledBack(
                    from_step=decision.at_step,
                    step=history.checkpoint_step or 0,
                    rows=decision.rows,
                    loss=decision.spike.loss,
                    median=decision.spike.median,
                    reason=decision.reason,
                )
            )
        case Resize(waiting=False):
            recorder.restart_reason = decision.reason
        case Resize(announce=True):
            recorder.journal.write(Notice(message=f"{decision.reason.capitalize()}; the run waits for it."))
        case _:
            pass


def _wait_for_capacity(config: TrainConfig, *, restarted: bool) -> int:
    """Number of workers that an elastic run starts with: the most that there is room for, and at least its minimum.

    After a restart it waits until the resources of the old workers are free: until the number is stable, at most
    CAPACITY_TIMEOUT_S.
    """
    deadline = time.monotonic() + (CAPACITY_TIMEOUT_S if restarted else CAPACITY_TIMEOUT_S / 3)
    capacities: list[int] = []
    while True:
        capacities.append(max_workers(current_nodes(), config))
        # The resources of the old workers become free one by one.
        stable = len(capacities) > 5 and len(set(capacities[-5:])) == 1 and capacities[-1] > 0
        if capacities[-1] == config.parallel.workers or stable or time.monotonic() >= deadline:
            # With too little room for the minimum, Ray waits for it, and an autoscaler sees the demand.
            return max(capacities[-1], worker_counts(config)[0])
        time.sleep(1.0)


def run_attempt(task: WorkerTask, supervision: Supervision) -> Outcome:
    """Run Ray Train once."""
    no_capacity, fault = False, None
    storage = task.job / ".ray"
    with watching(task, supervision) as watcher:
        try:
            _trainer(task, str(storage)).fit()
        except ray.train.TrainingFailedError as error:
            if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
                no_capacity = True
            else:
                fault = watcher.fault or _fault_of(error, watcher.last_heartbeats())
        except ray.exceptions.RayError as error:
            # The controller is gone, and Ray ends its workers. They must be gone before others write checkpoints.
            fault = watcher.fault or Fault(
                kind="controller", reason=f"Ray Train's controller ended: {last_line(str(error))}"
            )
            kill_workers(watcher.heartbeats)
        finally:
            shutil.rmtree(storage, ignore_errors=True)
    fatal: Refused | None = None
    with contextlib.suppress(ray.exceptions.RayError):
        fatal = ray.get(task.mailbox.fatal_error.remote())
    if fatal is not None:
        return fatal
    if watcher.exported is not None:
        return Completed(watcher.exported)
    if no_capacity:
        return NoCapacity(task.config.parallel.workers)
    if watcher.stopped is not None:
        return watcher.stopped
    return Faulted(fault or Fault(kind="workers", reason="training ended without an export"))


def worker_environment(config: TrainConfig) -> dict[str, str]:
    """Environment variables of a job's workers."""
    # transformers imports DeepSpeed if it is installed, which would probe for devices and warn if it finds none.
    return {**WORKER_ENVIRONMENT, "DS_ACCELERATOR": "cuda" if config.parallel.gpus_per_worker else "cpu"}


def _run_worker(settings: dict[str, Any]) -> None:
    # Imported by the workers alone: the layouts' modules take seconds, and the driver needs none of them.
    from tandem.train.worker import run_worker

    run_worker(settings)


def _trainer(task: WorkerTask, storage: str) -> ray.train.torch.TorchTrainer:
    parallel = task.config.parallel
    return ray.train.torch.TorchTrainer(
        _run_worker,
        train_loop_config={"task": task},
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if parallel.gpus_per_worker else "gloo"),
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg] # typed as that of Train's first version
            num_workers=parallel.workers,
            # Without the nodes that are cordoned now; None: all of them.
            label_selector=placement_selector() or None,
            # As few nodes as possible. Ray numbers the ranks of a node consecutively, and tensor groups are consecutive ranks.
            placement_strategy="PACK",
            use_gpu=parallel.gpus_per_worker > 0,
            resources_per_worker={
                "CPU": parallel.cpus_per_worker,
                **({"GPU": parallel.gpus_per_worker} if parallel.gpus_per_worker else {}),
                **parallel.resources_per_worker,
            },
        ),
        run_config=RunConfig(  # type: ignore[arg-type]
            # A new name each time: the run resumes from our checkpoints, never from Ray's record of an earlier run.
            name=uuid.uuid4().hex[:8],
            storage_path=storage,
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
            worker_runtime_env={"env_vars": worker_environment(task.config)},
        ),
    )


def _fault_of(error: ray.train.TrainingFailedError, heartbeats: Sequence[Heartbeat]) -> Fault:
    """The fault behind Ray Train's error."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", None) or {}
    if not failures:
        return Fault(kind="workers", reason=last_line(str(error)))
    # Peers of a lost node report a lost connection before Ray knows that the node is gone.
    if lost_nodes := find_lost_nodes(heartbeat.node for heartbeat in heartbeats):
        ranks = [heartbeat.rank for heartbeat in heartbeats if heartbeat.node in lost_nodes]
        names = ", ".join(node[:8] for node in lost_nodes)
        return Fault(kind="node", reason=f"node {names} went, and ranks {ranks} with it", rank=ranks[0])
    died = [rank for rank, e in failures.items() if "Died" in f"{type(e).__name__} {e}"]
    rank, reason = health.find_culprit({rank: last_line(str(e)) for rank, e in failures.items()}, died, heartbeats)
    return Fault(kind="worker", reason=f"worker {rank}: {reason}", rank=rank)
