"""Supervision of the workers of one attempt: records their events, kills hung workers, and commands workers to save or stop."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ray
import ray.exceptions

from tandem.config import TrainConfig
from tandem.observability.events import (
    CheckpointExported,
    Event,
    Exported,
    HangDetected,
    Notice,
    SlowRank,
    WorkersStopped,
)
from tandem.train.supervision import health
from tandem.train.supervision.capacity import current_nodes, max_workers, workers_by_node
from tandem.train.supervision.commands import Command, DumpStacks, SaveCheckpoint, StopTraining
from tandem.train.supervision.heartbeat import Heartbeat
from tandem.train.supervision.outcome import Fault, Refused, StoppedEarly, last_line
from tandem.train.supervision.processes import dump_stack, kill_workers
from tandem.train.supervision.recorder import EventRecorder
from tandem.train.supervision.stop_request import StopRequest
from tandem.train.task import WorkerTask

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """Shared by the supervision of all attempts of a run."""

    config: TrainConfig
    """The run's config, of an elastic run with its largest number of workers."""
    recorder: EventRecorder
    stop_request: StopRequest
    on_exported: Callable[[Exported], None]
    """Called in the watcher's thread when the export is complete: workers take some seconds more to end."""
    on_checkpoint_exported: Callable[[CheckpointExported], None]
    """Called in the watcher's thread when a checkpoint is exported."""


class Watcher(threading.Thread):
    """Follows the workers of one attempt through its mailbox, until `stop`."""

    def __init__(self, task: WorkerTask, supervision: Supervision) -> None:
        super().__init__(name="watcher", daemon=True)
        self.heartbeats: list[Heartbeat] = []
        self.exported: Exported | None = None
        self.stopped: StoppedEarly | None = None
        self.fault: Fault | None = None
        """A fault that this thread found: a hang, or a mailbox that ended."""
        self.problem: Exception | None = None
        """The exception that ended this thread."""
        self._task, self._supervision = task, supervision
        self._journal, self._stop_request = supervision.recorder.journal, supervision.stop_request
        self._ended = threading.Event()
        self._checked_at = 0.0
        self._suspected: health.Hang | None = None
        self._reported_slow: set[int] = set()
        self._stop_reason: str | None = None
        self._stop_requested_at: float | None = None
        self._capacity_since: float | None = None
        self._saved_before_drain_of: set[str] = set()

    def last_heartbeats(self) -> list[Heartbeat]:
        """The newest heartbeat of each rank, also of those that have ended."""
        with contextlib.suppress(ray.exceptions.RayError):
            self.heartbeats = ray.get(self._task.mailbox.heartbeats.remote())
        return self.heartbeats

    def stop(self) -> None:
        """Handle the remaining events, and end."""
        self._ended.set()
        self.join()

    def run(self) -> None:
        """See `Thread`."""
        try:
            while True:
                last = self._ended.is_set()
                for event in ray.get(self._task.mailbox.take.remote(0.05 if last else 0.5)):
                    self._handle_event(event)
                if last:
                    return
                if time.monotonic() - self._checked_at >= min(1.0, self._task.config.faults.heartbeat_s):
                    self._check_workers()
                    self._checked_at = time.monotonic()
        except ray.exceptions.RayActorError as error:
            # Without a mailbox the workers' heartbeats are lost: they are restarted with a new one.
            self.fault = self.fault or Fault(kind="mailbox", reason=f"the mailbox ended: {last_line(str(error))}")
            kill_workers(self.heartbeats)
        except Exception as error:  # noqa: BLE001 - raised again by the main thread
            self.problem = error
            # Workers that start again refuse to train; checkpoints stay.
            with contextlib.suppress(Exception):
                ray.get(self._task.mailbox.report_fatal.remote(Refused(error=type(error).__name__, message=str(error))))
                kill_workers(self.heartbeats)

    def _handle_event(self, event: Event) -> None:
        match event:
            case Exported():
                self.exported = event
                self._supervision.on_exported(event)
            case CheckpointExported():
                self._supervision.recorder.record(event)
                self._supervision.on_checkpoint_exported(event)
            case WorkersStopped(spike=None):
                self.stopped = StoppedEarly(step=event.step, reason=self._stop_reason or "asked to")
            case WorkersStopped():
                reason = self._stop_reason or "a loss that jumped"
                self.stopped = StoppedEarly(step=event.step, reason=reason, spike=event.spike)
            case _:
                self._supervision.recorder.record(event)

    # ---- health ----------------------------------------------------------------------------------------------------

    def _check_workers(self) -> None:
        faults = self._task.config.faults
        self.heartbeats = ray.get(self._task.mailbox.heartbeats.remote())
        if self.fault is not None:
            return
        hang = health.find_hang(self.heartbeats, faults)
        # Confirmed by a second check: this process may have been suspended itself.
        if hang is not None and self._suspected is not None and set(hang.ranks) & set(self._suspected.ranks):
            self._kill_hung(hang)
            return
        self._suspected = hang
        for rank, reason in health.find_slow_ranks(self.heartbeats, faults.slow_factor).items():
            if rank not in self._reported_slow:
                self._reported_slow.add(rank)
                node = next(heartbeat.node for heartbeat in self.heartbeats if heartbeat.rank == rank)
                self._journal.write(SlowRank(rank=rank, node=node, reason=f"rank {rank} is slow: {reason}"))
        self._check_stop_and_resize()

    def _kill_hung(self, hang: health.Hang) -> None:
        hung = [heartbeat for heartbeat in self.heartbeats if heartbeat.rank in hang.ranks]
        self._command(DumpStacks())
        stacks = {heartbeat.rank: dump_stack(heartbeat) for heartbeat in hung}
        time.sleep(2 * self._task.config.faults.heartbeat_s)
        # The ranks that still send heartbeats add their own stacks.
        for heartbeat in ray.get(self._task.mailbox.heartbeats.remote()):
            if heartbeat.rank not in stacks and heartbeat.stack:
                stacks[heartbeat.rank] = heartbeat.stack
        self.fault = Fault(kind="hang", reason=hang.reason, rank=hang.ranks[0])
        self._journal.write(
            HangDetected(
                ranks=hang.ranks,
                reason=hang.reason,
                stacks={str(rank): stack for rank, stack in sorted(stacks.items())},
            )
        )
        # Their peers wait for them: one dead worker is enough for Ray Train to end the attempt.
        kill_workers(hung)

    # ---- commands --------------------------------------------------------------------------------------------------

    def _check_stop_and_resize(self) -> None:
        if self._stop_request:
            self._stop_requested_at = self._stop_requested_at or time.monotonic()
            deadline_passed = time.monotonic() - self._stop_requested_at > self._task.config.faults.leave_s
            if (deadline_passed or not self.heartbeats) and not self._stop_request.overdue:
                kill_workers(self.heartbeats)
                self._stop_request.interrupt()
                return
        any_done = any(heartbeat.phase == "done" for heartbeat in self.heartbeats)
        if self._stop_reason is not None or not self.heartbeats or any_done:
            return
        if self._stop_request:
            self._stop_workers("the job was told to stop")
            return
        if reasons := [heartbeat.stop_reason for heartbeat in self.heartbeats if heartbeat.stop_reason]:
            self._stop_workers(reasons[0])
            return
        self._check_capacity()

    def _check_capacity(self) -> None:
        """Save or stop before a node is drained; stop to grow once there has been room for more workers for a while."""
        run_config, attempt_config = self._supervision.config, self._task.config
        try:
            nodes = current_nodes()
        except Exception as error:  # noqa: BLE001 - the cluster's state can be read again at the next check
            log.warning("The cluster's nodes cannot be listed: %s", error)
            return
        own_workers = workers_by_node(self.heartbeats)
        draining = {node.id for node in nodes if node.draining and node.id in own_workers}
        if draining - self._saved_before_drain_of:
            self._saved_before_drain_of |= draining
            reason = f"node {', '.join(node[:8] for node in sorted(draining))} will be taken away"
            if max_workers(nodes, run_config, own_workers):
                self._stop_workers(reason)
            else:
                self._journal.write(Notice(message=f"{reason}: a checkpoint is written."))
                self._command(SaveCheckpoint(len(self._saved_before_drain_of)))
            return
        if attempt_config.parallel.workers == run_config.parallel.workers:
            return
        if max_workers(nodes, run_config, own_workers) <= attempt_config.parallel.workers:
            self._capacity_since = None
            return
        self._capacity_since = self._capacity_since or time.monotonic()
        if time.monotonic() - self._capacity_since >= run_config.faults.grow_after_s:
            self._stop_workers("there is room for more workers")

    def _stop_workers(self, reason: str) -> None:
        self._stop_reason = reason
        self._command(StopTraining())

    def _command(self, command: Command) -> None:
        ray.get(self._task.mailbox.command.remote(command))


@contextlib.contextmanager
def watching(task: WorkerTask, supervision: Supervision) -> Iterator[Watcher]:
    """Supervise an attempt for the length of a `with` block; raises the exception that ended the watcher, if any."""
    watcher = Watcher(task, supervision)
    watcher.start()
    supervision.stop_request.training = True
    try:
        yield watcher
    finally:
        supervision.stop_request.training = False
        watcher.stop()
    if watcher.problem is not None:
        raise watcher.problem
