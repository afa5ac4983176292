"""History of a job's attempts, from its events: run time, preemptions, and the resize that is under way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tandem.jobs.work.records import NumberedEvent
from tandem.jobs.work.states import Action, State
from tandem.jobs.work.store import JobStore
from tandem.observability.events import ResizeRequested, StateChanged

EVENTS_OF_PAGE = 1000
_KEEPS_RESIZE = frozenset({Action.STOPPED, Action.STARTED})


@dataclass(frozen=True, kw_only=True, slots=True)
class RunHistory:
    """What the attempts of a job used, since it was last requeued after an end, or started by a command."""

    ran_s: float = 0.0
    """Run time of the attempts that have ended."""
    started_s: float | None = None
    """Start of the attempt that is active, in seconds since 1970; None: none is."""
    preemptions: int = 0
    """Resizes are none."""
    resize_to: int | None = None
    """Workers that the next attempt is to have; None: as many as there is room for."""


def read_history(store: JobStore, job_id: str) -> RunHistory:
    """The history of a job in the store."""
    events: list[NumberedEvent] = []
    while page := store.events(job_id, after=events[-1].number if events else 0, limit=EVENTS_OF_PAGE):
        events += page
    return history_of(events)


def history_of(events: Iterable[NumberedEvent]) -> RunHistory:
    """The history that a job's events tell, oldest first. Events of other kinds are skipped. Pure."""
    ran_s, started_s, preemptions, resize_to = 0.0, None, 0, None
    for _, event in events:
        if isinstance(event, ResizeRequested):
            resize_to = event.workers
            preemptions -= 1
        if not isinstance(event, StateChanged):
            continue
        time_s = event.time or 0.0
        is_active = State(event.to_state).active
        if event.action in (Action.REQUEUE, Action.ADOPT):
            ran_s, preemptions = 0.0, 0
        if event.action == Action.PREEMPT:
            preemptions += 1
        if event.action not in _KEEPS_RESIZE:
            resize_to = None
        if is_active and started_s is None:
            started_s = time_s
        elif not is_active and started_s is not None:
            ran_s += max(0.0, time_s - started_s)
            started_s = None
    return RunHistory(ran_s=ran_s, started_s=started_s, preemptions=preemptions, resize_to=resize_to)
