"""Supervision of the workers of one attempt: records their events, ends hung workers, and asks workers to stop."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray
import ray.exceptions

from tandem.config import TrainConfig
from tandem.train.supervision import health
from tandem.train.supervision.capacity import current_nodes, max_workers, workers_by_node
from tandem.train.supervision.health import Heartbeat
from tandem.train.supervision.history import Fault, Outcome, RunHistory, StopRequest, last_line
from tandem.train.supervision.processes import dump_stack, kill_workers
from tandem.train.worker import WorkerTask

log = logging.getLogger(__name__)


class Watcher(threading.Thread):
    """Writes events as they come, and looks after the workers, until `stop`, when the mailbox is empty."""

    def __init__(
        self, task: WorkerTask, history: RunHistory, stop_request: StopRequest, outcome: Outcome, whole: TrainConfig
    ) -> None:
        super().__init__(name="events", daemon=True)
        self.heartbeats: list[Heartbeat] = []
        self.hang: Fault | None = None
        self.problem: Exception | None = None
        self._task, self._history, self._stop_request, self._outcome, self._whole = (
            task,
            history,
            stop_request,
            outcome,
            whole,
        )
        self._over = threading.Event()
        self._checked_at = 0.0
        self._suspected: health.Hang | None = None
        self._told_slow: set[int] = set()
        self._stop_reason: str | None = None
        self._stop_requested_at: float | None = None
        self._capacity_since: float | None = None
        self._saved_for: set[str] = set()

    def last_heartbeats(self) -> list[Heartbeat]:
        """The newest heartbeat of each rank, also of those that have left."""
        with contextlib.suppress(ray.exceptions.RayError):
            self.heartbeats = [
                Heartbeat.read(heartbeat) for heartbeat in ray.get(self._task.mailbox.heartbeats.remote())
            ]
        return self.heartbeats

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
                    self._handle_event(event)
                if last:
                    return
                if time.monotonic() - self._checked_at >= min(1.0, self._task.config.faults.heartbeat_s):
                    self._inspect()
                    self._checked_at = time.monotonic()
        except ray.exceptions.RayActorError as error:
            # The mailbox is gone: nobody would hear the workers, so they start again with another.
            self.hang = self.hang or Fault(kind="mailbox", reason=f"the mailbox ended: {last_line(str(error))}")
            kill_workers(self.heartbeats)
        except Exception as error:  # noqa: BLE001 - raised again by the main thread
            self.problem = error
            # The workers' next look at the mailbox tells them; what is trained so far stays.
            with contextlib.suppress(Exception):
                ray.get(self._task.mailbox.report_fatal.remote(type(error).__name__, str(error), 1))
                kill_workers(self.heartbeats)

    def _handle_event(self, event: dict[str, Any]) -> None:
        history = self._history
        match event["event"]:
            case "exported":
                self._outcome.end.update(event)
                self._history.exported(event)
            case "left":
                self._outcome.left = {
                    **event,
                    "reason": self._stop_reason or ("a loss that jumped" if "spike" in event else "stop_request to"),
                }
            case "started":
                self._record_start(event)
            case _:
                if event["event"] == "step":
                    history.step, history.broke_at = event["step"], time.monotonic()
                history.journal.write(event)
                history.metrics.write(event)

    def _record_start(self, event: dict[str, Any]) -> None:
        history = self._history
        history.starts += 1
        if history.starts == 1:
            history.journal.write(event)
        else:
            resumed = event["resumed_from"] or 0
            if event["workers"] != history.workers:
                history.journal.write(
                    {
                        "event": "resized", "from": history.workers, "to": event["workers"], "layout": event["layout"],
                        "reason": history.reason, "step": resumed,
                    }
                )  # fmt: skip
            history.journal.write(
                {
                    "event": "restart", "reason": history.reason, "resumed_from": event["resumed_from"],
                    "workers": event["workers"], "repeated": max(0, history.step - resumed),
                    "lost_s": round(time.monotonic() - history.broke_at, 3) if history.broke_at else None,
                }
            )  # fmt: skip
        history.workers = event["workers"]

    # ---- looking after the workers ---------------------------------------------------------------------------------

    def _inspect(self) -> None:
        faults = self._task.config.faults
        self.heartbeats = [Heartbeat.read(heartbeat) for heartbeat in ray.get(self._task.mailbox.heartbeats.remote())]
        if self.hang is not None:
            return
        found = health.find_hang(self.heartbeats, faults)
        # Looked at twice: it may have been us who slept.
        if found is not None and self._suspected is not None and set(found.ranks) & set(self._suspected.ranks):
            self._kill_hung(found)
            return
        self._suspected = found
        for rank, said in health.find_slow_ranks(self.heartbeats, faults.slow_factor).items():
            if rank not in self._told_slow:
                self._told_slow.add(rank)
                node = next(heartbeat.node for heartbeat in self.heartbeats if heartbeat.rank == rank)
                self._history.journal.write(
                    {"event": "slow", "rank": rank, "node": node, "reason": f"rank {rank} is slow: {said}"}
                )
        self._handle_requests()

    def _kill_hung(self, found: health.Hang) -> None:
        stuck = [heartbeat for heartbeat in self.heartbeats if heartbeat.rank in found.ranks]
        mailbox = self._task.mailbox
        ray.get(mailbox.command.remote({"stacks": True}))
        stacks = {heartbeat.rank: dump_stack(heartbeat) for heartbeat in stuck}
        time.sleep(2 * self._task.config.faults.heartbeat_s)
        # Those that can answer say themselves where they wait.
        for heartbeat in map(Heartbeat.read, ray.get(mailbox.heartbeats.remote())):
            if heartbeat.rank not in stacks and heartbeat.stack:
                stacks[heartbeat.rank] = heartbeat.stack
        self.hang = Fault(kind="hang", reason=found.why, rank=found.ranks[0])
        self._history.journal.write(
            {
                "event": "hang", "ranks": list(found.ranks), "reason": found.why,
                "stacks": {str(rank): stack for rank, stack in sorted(stacks.items())},
            }
        )  # fmt: skip
        # Their peers wait for them: one is enough for Ray Train to start all of them again.
        kill_workers(stuck)

    def _handle_requests(self) -> None:
        if self._stop_request:
            self._stop_requested_at = self._stop_requested_at or time.monotonic()
            late = time.monotonic() - self._stop_requested_at > self._task.config.faults.leave_s
            if (late or not self.heartbeats) and not self._stop_request.overdue:
                kill_workers(self.heartbeats)
                self._stop_request.interrupt()
                return
        if (
            self._stop_reason is not None
            or not self.heartbeats
            or any(heartbeat.phase == "done" for heartbeat in self.heartbeats)
        ):
            return
        if self._stop_request:
            self._stop_workers("the job was told to stop")
            return
        if reasons := [heartbeat.stop_reason for heartbeat in self.heartbeats if heartbeat.stop_reason]:
            self._stop_workers(reasons[0])
            return
        try:
            nodes = current_nodes()
        except Exception as error:  # noqa: BLE001 - whatever the cluster cannot say now, it says later
            log.warning("The cluster does not tell its nodes: %s", error)
            return
        ours = workers_by_node(self.heartbeats)
        going = {node.id for node in nodes if node.draining and node.id in ours}
        if going - self._saved_for:
            self._saved_for |= going
            why = f"node {', '.join(node[:8] for node in sorted(going))} will be taken away"
            if max_workers(nodes, self._whole, ours):
                self._stop_workers(why)
            else:
                self._history.journal.write({"event": "notice", "message": f"{why}: a checkpoint is written."})
                ray.get(self._task.mailbox.command.remote({"save": len(self._saved_for)}))
            return
        if self._task.config.parallel.workers == self._whole.parallel.workers:
            return
        if max_workers(nodes, self._whole, ours) <= self._task.config.parallel.workers:
            self._capacity_since = None
            return
        self._capacity_since = self._capacity_since or time.monotonic()
        if time.monotonic() - self._capacity_since >= self._whole.faults.grow_after_s:
            self._stop_workers("there is room for more workers")

    def _stop_workers(self, reason: str) -> None:
        self._stop_reason = reason
        ray.get(self._task.mailbox.command.remote({"leave": True}))


@contextlib.contextmanager
def watching(
    task: WorkerTask, history: RunHistory, stop_request: StopRequest, outcome: Outcome, whole: TrainConfig
) -> Iterator[Watcher]:
    """Look after an attempt as long as it lasts; raises what broke the watch."""
    watch = Watcher(task, history, stop_request, outcome, whole)
    watch.start()
    stop_request.training = True
    try:
        yield watch
    finally:
        stop_request.training = False
        watch.stop()
    if watch.problem is not None:
        raise watch.problem
