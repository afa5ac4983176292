"""Runs a job's workers under Ray Train, again and again until they are done: what goes wrong in between is borne, and told.

One attempt is one run of Ray Train with a fixed number of workers and no retries of its own. What follows it is decided here, in
one place, whether a worker died, a node, Ray Train's controller, or nobody: the driver ends workers that hang, asks them to leave
when there is room for more or will be less, and counts how often in a row nothing came of it.
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

from tandem import errors
from tandem.checkpoint import folders
from tandem.config import SpikeConfig, TrainConfig, with_workers, worker_counts
from tandem.data.stream import rows_behind
from tandem.errors import JobError, JobStopped
from tandem.observability.journal import Journal
from tandem.storage import Location
from tandem.train.reporting.metrics import Metrics
from tandem.train.storage_retry import wait_for_storage
from tandem.train.supervision import health
from tandem.train.supervision.capacity import current_nodes, max_workers
from tandem.train.supervision.health import Heartbeat
from tandem.train.supervision.history import Fault, Outcome, RunHistory, StopRequest, last_line
from tandem.train.supervision.mailbox import open_mailbox
from tandem.train.supervision.processes import find_lost_nodes, kill_workers
from tandem.train.supervision.watch import watching
from tandem.train.worker import WorkerTask, run_worker

WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""One intra-op thread a process: oversubscribed threads were 3 to 14 times slower (facts.md)."""

CAPACITY_TIMEOUT_S = 30.0
"""Seconds at most in which an elastic run waits for the room that its old workers leave, before it goes on with fewer."""


def worker_environment(config: TrainConfig) -> dict[str, str]:
    """Variables of a job's workers."""
    # Where DeepSpeed is installed transformers imports it, and it would look for devices, and warn of finding none.
    return {**WORKER_ENVIRONMENT, "DS_ACCELERATOR": "cuda" if config.parallel.gpus_per_worker else "cpu"}


def run_workers(
    task: WorkerTask,
    journal: Journal,
    metrics: Metrics,
    stop_request: StopRequest | None = None,
    *,
    exported: Callable[[dict[str, Any]], None] = lambda end: None,
) -> dict[str, Any]:
    """Run workers until they are done; returns their last event. `exported`: see `RunHistory`.

    Raises what they cannot go on from, JobError after too many faults without a new checkpoint, JobStopped if `stop_request` to.
    """
    # Not `or`: a StopRequest is false until it is set.
    stop_request = StopRequest() if stop_request is None else stop_request
    config, root = task.config, folders.checkpoints_root(task.config.checkpoint, task.job)
    history = RunHistory(journal, metrics, exported)
    failures, kept, waited = 0, -1, False
    skip = [(e["rows"][0], e["rows"][1]) for e in journal.read() if e["event"] == "rollback"]
    while True:
        workers = config.parallel.workers
        if len(worker_counts(config)) > 1:
            workers = _wait_for_capacity(config, settle=history.starts > 0)
        attempt = replace(task, config=with_workers(config, workers), mailbox=open_mailbox(), skip=tuple(skip))
        outcome = _attempt(attempt, history, stop_request, whole=config)
        if outcome.refusal is not None:
            kind, message, _ = outcome.refusal
            raise getattr(errors, kind, JobError)(message)
        if outcome.end:
            return outcome.end
        wait_for_storage(root, journal, config.faults.storage_retry_s)
        newest = folders.latest(root)
        step = folders.read_state(newest).step if newest else 0
        if stop_request:
            where = f"It goes on from step {step} with the same command."
            raise JobStopped(f"The job was told to stop, and left after step {history.step}. {where}")
        if outcome.left is not None:
            if not outcome.left.get("waited"):
                history.reason = str(outcome.left["reason"])
            elif not waited:
                journal.write(
                    {"event": "notice", "message": f"{outcome.left['reason'].capitalize()}; the run waits for it."}
                )
            waited = bool(outcome.left.get("waited"))
            if spike := outcome.left.get("spike"):
                skip.append(_roll_back(config, spike, outcome.left["step"], newest, journal, again=len(skip)))
            continue
        fault = outcome.fault or Fault(kind="workers", reason="training ended without an export")
        history.reason = fault.reason
        journal.write(
            {"event": "fault", "kind": fault.kind, "rank": fault.rank, "reason": fault.reason, "step": history.step}
        )
        # A run that gets on may break often; one that does not is not tried for ever.
        failures = 1 if step > kept else failures + 1
        kept = step
        if failures > config.checkpoint.max_failures:
            raise JobError(
                f"Training failed {failures} times without a new checkpoint in between, the last time with: {fault.reason} "
                f"Run the same command again to go on from {f'step {step}' if newest else 'the start'}."
            )


def _roll_back(
    config: TrainConfig, spike: dict[str, Any], at: int, newest: Location | None, journal: Journal, *, again: int
) -> tuple[int, int]:
    """The rows that are left out from now on, since the loss of step `at` jumped; JobError if that was once too often."""
    policy = config.faults.spike or SpikeConfig()
    said = f"the loss jumped to {spike['loss']:.4g} in step {at}, from {spike['median']:.4g}"
    if again >= policy.max_rollbacks:
        raise JobError(
            f"{said[0].upper()}{said[1:]}, and the run has gone back {again} times before. Lower optimizer.learning_rate, or "
            f"raise faults.spike.max_rollbacks ({policy.max_rollbacks}) or faults.spike.factor ({policy.factor:g})."
        )
    state = folders.read_state(newest) if newest else None
    first = rows_behind(state.cursor) if state else 0
    journal.write(
        {
            "event": "rollback", "from": at, "step": state.step if state else 0, "rows": [first, spike["rows"]],
            "loss": spike["loss"], "median": spike["median"],
            "reason": f"{said}: rows {first} to {spike['rows'] - 1} are left out",
        }
    )  # fmt: skip
    return first, int(spike["rows"])


def _wait_for_capacity(config: TrainConfig, *, settle: bool) -> int:
    """How many workers an elastic run is to begin with now: the most there is room for, and never fewer than its least."""
    deadline = time.monotonic() + (CAPACITY_TIMEOUT_S if settle else CAPACITY_TIMEOUT_S / 3)
    seen: list[int] = []
    while True:
        seen.append(max_workers(current_nodes(), config))
        # What the old workers had comes back piece by piece.
        steady = len(seen) > 5 and len(set(seen[-5:])) == 1 and seen[-1] > 0
        if seen[-1] == config.parallel.workers or steady or time.monotonic() >= deadline:
            # With too little room for the least, Ray waits for it, and an autoscaler hears of it.
            return max(seen[-1], worker_counts(config)[0])
        time.sleep(1.0)


def _attempt(task: WorkerTask, history: RunHistory, stop_request: StopRequest, *, whole: TrainConfig) -> Outcome:
    """Run Ray Train once."""
    config, outcome = task.config, Outcome()
    storage = task.job / ".ray"
    with watching(task, history, stop_request, outcome, whole) as watch:
        trainer = ray.train.torch.TorchTrainer(
            run_worker,
            train_loop_config={"task": task},
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if config.parallel.gpus_per_worker else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.parallel.workers,
                # As few nodes as can be; Ray numbers the ranks of a node in a row, which is how tensor groups are cut.
                placement_strategy="PACK",
                use_gpu=config.parallel.gpus_per_worker > 0,
                resources_per_worker={
                    "CPU": config.parallel.cpus_per_worker,
                    **({"GPU": config.parallel.gpus_per_worker} if config.parallel.gpus_per_worker else {}),
                    **config.parallel.resources_per_worker,
                },
            ),
            run_config=RunConfig(  # type: ignore[arg-type]
                # Our own checkpoints say where to go on; Ray's record of a run that died must not.
                name=uuid.uuid4().hex[:8],
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
                worker_runtime_env={"env_vars": worker_environment(config)},
            ),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
                outcome.left = {"reason": f"there was no room for {config.parallel.workers} workers", "waited": True}
            else:
                outcome.fault = watch.hang or _why(error, watch.last_heartbeats())
        except ray.exceptions.RayError as error:
            # The controller is gone. Ray ends its workers, which must be over before others write checkpoints.
            outcome.fault = watch.hang or Fault(
                kind="controller", reason=f"Ray Train's controller ended: {last_line(str(error))}"
            )
            kill_workers(watch.heartbeats)
        finally:
            shutil.rmtree(storage, ignore_errors=True)
    with contextlib.suppress(ray.exceptions.RayError):
        outcome.refusal = ray.get(task.mailbox.fatal_error.remote())
    return outcome


def _why(error: ray.train.TrainingFailedError, heartbeats: Sequence[Heartbeat]) -> Fault:
    """The fault that is behind what Ray Train says of the workers."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", None) or {}
    if not failures:
        return Fault(kind="workers", reason=last_line(str(error)))
    # Its peers tell of a lost connection, before anybody knows of the node.
    if lost := find_lost_nodes(heartbeat.node for heartbeat in heartbeats):
        ranks = [heartbeat.rank for heartbeat in heartbeats if heartbeat.node in lost]
        names = ", ".join(node[:8] for node in lost)
        return Fault(kind="node", reason=f"node {names} went, and ranks {ranks} with it", rank=ranks[0])
    died = [rank for rank, e in failures.items() if "Died" in f"{type(e).__name__} {e}"]
    rank, said = health.find_culprit({rank: last_line(str(e)) for rank, e in failures.items()}, died, heartbeats)
    return Fault(kind="worker", reason=f"worker {rank}: {said}", rank=rank)
