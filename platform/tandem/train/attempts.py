"""Runs a job's workers under Ray Train, again and again until they are done: what goes wrong in between is borne, and told.

One attempt is one run of Ray Train with a fixed number of workers and no retries of its own. What follows it is decided here, in
one place, whether a worker died, a node, Ray Train's controller, or nobody: the driver ends workers that hang, asks them to leave
when there is room for more or will be less, and counts how often in a row nothing came of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.train.torch
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.config import FailureConfig, RunConfig

from tandem import errors
from tandem.checkpoint import folders
from tandem.config import SpikeConfig, TrainConfig, sized, sizes
from tandem.data.stream import rows_behind
from tandem.errors import JobError, JobStopped
from tandem.observability.journal import Journal
from tandem.storage import Location
from tandem.train import health
from tandem.train.health import Sign
from tandem.train.mailbox import open_mailbox
from tandem.train.metrics import Metrics
from tandem.train.persistence import wait_for_storage
from tandem.train.processes import end_workers, lost_nodes, stack_of
from tandem.train.room import fitting, nodes_now, placed
from tandem.train.worker import WorkerTask, run_worker

log = logging.getLogger(__name__)

WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""One intra-op thread a process: oversubscribed threads were 3 to 14 times slower (facts.md)."""

SETTLE_S = 30.0
"""Seconds at most in which an elastic run waits for the room that its old workers leave, before it goes on with fewer."""


def worker_environment(config: TrainConfig) -> dict[str, str]:
    """Variables of a job's workers."""
    # Where DeepSpeed is installed transformers imports it, and it would look for devices, and warn of finding none.
    return {**WORKER_ENVIRONMENT, "DS_ACCELERATOR": "cuda" if config.parallel.gpus_per_worker else "cpu"}


class Asked:
    """Whether the job was told to stop; set by a signal's handler, which may do nothing more."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.training = False
        """Whether there are workers that could save what they have."""
        self.overdue = False
        """Whether they have had their time."""

    def set(self) -> None:
        """The job was told to stop."""
        self._event.set()

    def __bool__(self) -> bool:
        return self._event.is_set()

    def unwind(self) -> None:
        """End the main thread's wait for workers that do not leave, by the signal that asked."""
        self.overdue = True
        os.kill(os.getpid(), signal.SIGTERM)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Why an attempt broke off."""

    kind: str
    """worker, node, controller, hang or workers (more than one)."""
    reason: str
    rank: int | None = None


@dataclass
class Course:
    """What the attempts of this driver have in common."""

    journal: Journal
    metrics: Metrics
    exported: Callable[[dict[str, Any]], None] = lambda end: None
    """Called in a thread when what was trained lies whole in the job's folder: workers take seconds more to end."""
    starts: int = 0
    workers: int = 0
    """Of the attempt before."""
    reason: str = ""
    """Why it ended."""
    step: int = 0
    """The last step that was told of."""
    broke_at: float = 0.0
    """When that attempt got its last step done."""


@dataclass
class Outcome:
    """What came of an attempt."""

    end: dict[str, Any] = field(default_factory=dict)
    """The workers' last event, if they are done."""
    left: dict[str, Any] | None = None
    """Their last event, if they left because they were asked to."""
    refusal: tuple[str, str, int] | None = None
    """An error that another attempt would meet again: class, text, exit status."""
    fault: Fault | None = None


def run_workers(
    task: WorkerTask,
    journal: Journal,
    metrics: Metrics,
    asked: Asked | None = None,
    *,
    exported: Callable[[dict[str, Any]], None] = lambda end: None,
) -> dict[str, Any]:
    """Run workers until they are done; returns their last event. `exported`: see `Course`.

    Raises what they cannot go on from, JobError after too many faults without a new checkpoint, JobStopped if `asked` to.
    """
    # Not `or`: it is false until it was asked.
    asked = Asked() if asked is None else asked
    config, root = task.config, folders.root_of(task.config.checkpoint, task.job)
    course = Course(journal, metrics, exported)
    failures, kept, waited = 0, -1, False
    skip = [(e["rows"][0], e["rows"][1]) for e in journal.read() if e["event"] == "rollback"]
    while True:
        workers = config.parallel.workers
        if len(sizes(config)) > 1:
            workers = _room(config, settle=course.starts > 0)
        attempt = replace(task, config=sized(config, workers), mailbox=open_mailbox(), skip=tuple(skip))
        outcome = _attempt(attempt, course, asked, whole=config)
        if outcome.refusal is not None:
            kind, message, _ = outcome.refusal
            raise getattr(errors, kind, JobError)(message)
        if outcome.end:
            return outcome.end
        wait_for_storage(root, journal, config.faults.storage_retry_s)
        newest = folders.latest(root)
        step = folders.read_state(newest).step if newest else 0
        if asked:
            where = f"It goes on from step {step} with the same command."
            raise JobStopped(f"The job was told to stop, and left after step {course.step}. {where}")
        if outcome.left is not None:
            if not outcome.left.get("waited"):
                course.reason = str(outcome.left["reason"])
            elif not waited:
                journal.write(
                    {"event": "notice", "message": f"{outcome.left['reason'].capitalize()}; the run waits for it."}
                )
            waited = bool(outcome.left.get("waited"))
            if spike := outcome.left.get("spike"):
                skip.append(_roll_back(config, spike, outcome.left["step"], newest, journal, again=len(skip)))
            continue
        fault = outcome.fault or Fault(kind="workers", reason="training ended without an export")
        course.reason = fault.reason
        journal.write(
            {"event": "fault", "kind": fault.kind, "rank": fault.rank, "reason": fault.reason, "step": course.step}
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


def _room(config: TrainConfig, *, settle: bool) -> int:
    """How many workers an elastic run is to begin with now: the most there is room for, and never fewer than its least."""
    deadline = time.monotonic() + (SETTLE_S if settle else SETTLE_S / 3)
    seen: list[int] = []
    while True:
        seen.append(fitting(nodes_now(), config))
        # What the old workers had comes back piece by piece.
        steady = len(seen) > 5 and len(set(seen[-5:])) == 1 and seen[-1] > 0
        if seen[-1] == config.parallel.workers or steady or time.monotonic() >= deadline:
            # With too little room for the least, Ray waits for it, and an autoscaler hears of it.
            return max(seen[-1], sizes(config)[0])
        time.sleep(1.0)


def _attempt(task: WorkerTask, course: Course, asked: Asked, *, whole: TrainConfig) -> Outcome:
    """Run Ray Train once."""
    config, outcome = task.config, Outcome()
    storage = task.job / ".ray"
    with _watched(task, course, asked, outcome, whole) as watch:
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
                outcome.fault = watch.hang or _why(error, watch.last_signs())
        except ray.exceptions.RayError as error:
            # The controller is gone. Ray ends its workers, which must be over before others write checkpoints.
            outcome.fault = watch.hang or Fault(
                kind="controller", reason=f"Ray Train's controller ended: {_last_line(str(error))}"
            )
            end_workers(watch.signs)
        finally:
            shutil.rmtree(storage, ignore_errors=True)
    with contextlib.suppress(ray.exceptions.RayError):
        outcome.refusal = ray.get(task.mailbox.failed.remote())
    return outcome


def _why(error: ray.train.TrainingFailedError, signs: Sequence[Sign]) -> Fault:
    """The fault that is behind what Ray Train says of the workers."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", None) or {}
    if not failures:
        return Fault(kind="workers", reason=_last_line(str(error)))
    # Its peers tell of a lost connection, before anybody knows of the node.
    if lost := lost_nodes(sign.node for sign in signs):
        ranks = [sign.rank for sign in signs if sign.node in lost]
        names = ", ".join(node[:8] for node in lost)
        return Fault(kind="node", reason=f"node {names} went, and ranks {ranks} with it", rank=ranks[0])
    died = [rank for rank, e in failures.items() if "Died" in f"{type(e).__name__} {e}"]
    rank, said = health.blame({rank: _last_line(str(e)) for rank, e in failures.items()}, died, signs)
    return Fault(kind="worker", reason=f"worker {rank}: {said}", rank=rank)


class Watch(threading.Thread):
    """Writes events as they come, and looks after the workers, until `stop`, when the mailbox is empty."""

    def __init__(self, task: WorkerTask, course: Course, asked: Asked, outcome: Outcome, whole: TrainConfig) -> None:
        super().__init__(name="events", daemon=True)
        self.signs: list[Sign] = []
        self.hang: Fault | None = None
        self.problem: Exception | None = None
        self._task, self._course, self._asked, self._outcome, self._whole = task, course, asked, outcome, whole
        self._over = threading.Event()
        self._looked = 0.0
        self._suspected: health.Hang | None = None
        self._told_slow: set[int] = set()
        self._leaving: str | None = None
        self._asked_at: float | None = None
        self._roomy_since: float | None = None
        self._saved_for: set[str] = set()

    def last_signs(self) -> list[Sign]:
        """The newest sign of each rank, also of those that have left."""
        with contextlib.suppress(ray.exceptions.RayError):
            self.signs = [Sign.read(sign) for sign in ray.get(self._task.mailbox.signs.remote())]
        return self.signs

    def stop(self) -> None:
        """Take what is left, and end."""
        self._over.set()
        self.join()

    def run(self) -> None:
        """See `Thread`."""
        try:
            while True:
                last = self._over.is_set()
                for event in ray.get(self._task.mailbox.take.remote(0.05 if last else 0.5)):
                    self._take_in(event)
                if last:
                    return
                if time.monotonic() - self._looked >= min(1.0, self._task.config.faults.heartbeat_s):
                    self._look()
                    self._looked = time.monotonic()
        except ray.exceptions.RayActorError as error:
            # The mailbox is gone: nobody would hear the workers, so they start again with another.
            self.hang = self.hang or Fault(kind="mailbox", reason=f"the mailbox ended: {_last_line(str(error))}")
            end_workers(self.signs)
        except Exception as error:  # noqa: BLE001 - raised again by the main thread
            self.problem = error
            # The workers' next look at the mailbox tells them; what is trained so far stays.
            with contextlib.suppress(Exception):
                ray.get(self._task.mailbox.fail.remote(type(error).__name__, str(error), 1))
                end_workers(self.signs)

    def _take_in(self, event: dict[str, Any]) -> None:
        course = self._course
        match event["event"]:
            case "exported":
                self._outcome.end.update(event)
                self._course.exported(event)
            case "left":
                self._outcome.left = {
                    **event,
                    "reason": self._leaving or ("a loss that jumped" if "spike" in event else "asked to"),
                }
            case "started":
                self._begun(event)
            case _:
                if event["event"] == "step":
                    course.step, course.broke_at = event["step"], time.monotonic()
                course.journal.write(event)
                course.metrics.write(event)

    def _begun(self, event: dict[str, Any]) -> None:
        course = self._course
        course.starts += 1
        if course.starts == 1:
            course.journal.write(event)
        else:
            resumed = event["resumed_from"] or 0
            if event["workers"] != course.workers:
                course.journal.write(
                    {
                        "event": "resized", "from": course.workers, "to": event["workers"], "layout": event["layout"],
                        "reason": course.reason, "step": resumed,
                    }
                )  # fmt: skip
            course.journal.write(
                {
                    "event": "restart", "reason": course.reason, "resumed_from": event["resumed_from"],
                    "workers": event["workers"], "repeated": max(0, course.step - resumed),
                    "lost_s": round(time.monotonic() - course.broke_at, 3) if course.broke_at else None,
                }
            )  # fmt: skip
        course.workers = event["workers"]

    # ---- looking after the workers ---------------------------------------------------------------------------------

    def _look(self) -> None:
        faults = self._task.config.faults
        self.signs = [Sign.read(sign) for sign in ray.get(self._task.mailbox.signs.remote())]
        if self.hang is not None:
            return
        found = health.hang(self.signs, faults)
        # Looked at twice: it may have been us who slept.
        if found is not None and self._suspected is not None and set(found.ranks) & set(self._suspected.ranks):
            self._end_hung(found)
            return
        self._suspected = found
        for rank, said in health.slow(self.signs, faults.slow_factor).items():
            if rank not in self._told_slow:
                self._told_slow.add(rank)
                node = next(sign.node for sign in self.signs if sign.rank == rank)
                self._course.journal.write(
                    {"event": "slow", "rank": rank, "node": node, "reason": f"rank {rank} is slow: {said}"}
                )
        self._look_at_orders()

    def _end_hung(self, found: health.Hang) -> None:
        stuck = [sign for sign in self.signs if sign.rank in found.ranks]
        mailbox = self._task.mailbox
        ray.get(mailbox.order.remote({"stacks": True}))
        stacks = {sign.rank: stack_of(sign) for sign in stuck}
        time.sleep(2 * self._task.config.faults.heartbeat_s)
        # Those that can answer say themselves where they wait.
        for sign in map(Sign.read, ray.get(mailbox.signs.remote())):
            if sign.rank not in stacks and sign.stack:
                stacks[sign.rank] = sign.stack
        self.hang = Fault(kind="hang", reason=found.why, rank=found.ranks[0])
        self._course.journal.write(
            {
                "event": "hang", "ranks": list(found.ranks), "reason": found.why,
                "stacks": {str(rank): stack for rank, stack in sorted(stacks.items())},
            }
        )  # fmt: skip
        # Their peers wait for them: one is enough for Ray Train to start all of them again.
        end_workers(stuck)

    def _look_at_orders(self) -> None:
        if self._asked:
            self._asked_at = self._asked_at or time.monotonic()
            late = time.monotonic() - self._asked_at > self._task.config.faults.leave_s
            if (late or not self.signs) and not self._asked.overdue:
                end_workers(self.signs)
                self._asked.unwind()
                return
        if self._leaving is not None or not self.signs or any(sign.phase == "done" for sign in self.signs):
            return
        if self._asked:
            self._leave("the job was told to stop")
            return
        if wishes := [sign.wish for sign in self.signs if sign.wish]:
            self._leave(wishes[0])
            return
        try:
            nodes = nodes_now()
        except Exception as error:  # noqa: BLE001 - whatever the cluster cannot say now, it says later
            log.warning("The cluster does not tell its nodes: %s", error)
            return
        ours = placed(self.signs)
        going = {node.id for node in nodes if node.leaving and node.id in ours}
        if going - self._saved_for:
            self._saved_for |= going
            why = f"node {', '.join(node[:8] for node in sorted(going))} will be taken away"
            if fitting(nodes, self._whole, ours):
                self._leave(why)
            else:
                self._course.journal.write({"event": "notice", "message": f"{why}: a checkpoint is written."})
                ray.get(self._task.mailbox.order.remote({"save": len(self._saved_for)}))
            return
        if self._task.config.parallel.workers == self._whole.parallel.workers:
            return
        if fitting(nodes, self._whole, ours) <= self._task.config.parallel.workers:
            self._roomy_since = None
            return
        self._roomy_since = self._roomy_since or time.monotonic()
        if time.monotonic() - self._roomy_since >= self._whole.faults.grow_after_s:
            self._leave("there is room for more workers")

    def _leave(self, reason: str) -> None:
        self._leaving = reason
        ray.get(self._task.mailbox.order.remote({"leave": True}))


@contextlib.contextmanager
def _watched(task: WorkerTask, course: Course, asked: Asked, outcome: Outcome, whole: TrainConfig) -> Iterator[Watch]:
    watch = Watch(task, course, asked, outcome, whole)
    watch.start()
    asked.training = True
    try:
        yield watch
    finally:
        asked.training = False
        watch.stop()
    if watch.problem is not None:
        raise watch.problem


def _last_line(text: str) -> str:
    # What Ray has to say of any process that ended tells nothing of this one.
    said = text.partition("Some common causes include")[0]
    lines = [line.strip() for line in said.strip().splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no reason given"
