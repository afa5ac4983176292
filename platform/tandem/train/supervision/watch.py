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
from tandem.train.supervision.capacity import fitting, nodes_now, placed
from tandem.train.supervision.health import Sign
from tandem.train.supervision.history import Asked, Course, Fault, Outcome, last_line
from tandem.train.supervision.processes import end_workers, stack_of
from tandem.train.worker import WorkerTask

log = logging.getLogger(__name__)


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
            self.hang = self.hang or Fault(kind="mailbox", reason=f"the mailbox ended: {last_line(str(error))}")
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
def watched(task: WorkerTask, course: Course, asked: Asked, outcome: Outcome, whole: TrainConfig) -> Iterator[Watch]:
    """Look after an attempt as long as it lasts; raises what broke the watch."""
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
