"""History of jobs: their events from the database and from the journals of their runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tandem.api import jobs as wire
from tandem.jobs.tracking.feeds import Chunk
from tandem.jobs.tracking.line_file import START, Line, lines_after
from tandem.jobs.tracking.positions import PlacedEvent, Position, merge
from tandem.jobs.work.records import Job, NumberedEvent
from tandem.jobs.work.states import JobKind
from tandem.jobs.work.store import JobStore
from tandem.observability import codec
from tandem.observability.events import Event, StateChanged
from tandem.settings import settings

PAGE = 1000


def folder_of(job: Job) -> Path | None:
    """The folder of a job's run; None for kinds that have none."""
    if job.kind is JobKind.SWEEP:
        return settings().sweeps_dir / job.id
    return settings().jobs_dir / job.id if job.kind is JobKind.TRAIN else None


class JobHistory:
    """Events of one job, read from a position on."""

    def __init__(self, store: JobStore, job: Job) -> None:
        self._store = store
        self._job_id = job.id
        folder = folder_of(job)
        self._journal = None if folder is None else folder / "events.jsonl"

    def read(self, after: Position, limit: int, *, line: Line = START) -> tuple[list[PlacedEvent], Line]:
        """The next events, `limit` at most, and the newest line of the journal among them.

        `line`: one that was returned before with the position, from which the journal is read on.
        """
        states = self._store.events(self._job_id, after=after.states, limit=limit)
        lines = self._lines(line, after.lines, limit)
        placed = merge(after, states, [NumberedEvent(each.number, event) for each, event in lines], limit)
        reached = placed[-1].position.lines if placed else after.lines
        return placed, next((each for each, _ in reversed(lines) if each.number <= reached), line)

    def run_events(self) -> list[Event]:
        """All events of the job's runs so far, oldest first."""
        if self._journal is not None and self._has_journal:
            return list(codec.read_events(self._journal))
        found: list[Event] = []
        after = 0
        while page := self._store.events(self._job_id, after=after, limit=PAGE):
            found += [event for _, event in page if not isinstance(event, StateChanged)]
            after = page[-1].number
        return found

    @property
    def _has_journal(self) -> bool:
        return self._journal is not None and self._journal.is_file()

    def _lines(self, last: Line, number: int, limit: int) -> list[tuple[Line, Event]]:
        """The next lines of the journal that hold an event of a kind that this release knows."""
        found: list[tuple[Line, Event]] = []
        while self._journal is not None and len(found) < limit:
            page = lines_after(self._journal, last, number, PAGE)
            if not page:
                break
            found += decoded(page)
            last, number = page[-1], page[-1].number
        return found[:limit]


def decoded(lines: Iterable[Line]) -> list[tuple[Line, Event]]:
    """The lines of a journal that hold an event of a kind that this release knows, each with its event."""
    events = ((line, next(map(codec.from_json, codec.parse([line.text])), None)) for line in lines)
    return [(line, event) for line, event in events if event is not None]


@dataclass(slots=True)
class EventFeed:
    """Events of a job from a position on, until it ends."""

    store: JobStore
    job: Job
    position: Position
    line: Line = START
    _history: JobHistory = field(init=False)

    def __post_init__(self) -> None:
        self._history = JobHistory(self.store, self.job)

    def next(self) -> Chunk[wire.TandemJobEvent]:
        """See `Feed`."""
        # Before the events: what is written at the job's end is then among them.
        ended = self.store.get(self.job.id).state.ended
        placed, self.line = self._history.read(self.position, PAGE, line=self.line)
        if placed:
            self.position = placed[-1].position
        has_more = len(placed) == PAGE
        items = [event_to_wire(self.job.id, each) for each in placed]
        return Chunk(items=items, has_more=has_more, ended=ended and not has_more)


def event_to_wire(job_id: str, placed: PlacedEvent) -> wire.TandemJobEvent:
    """An event."""
    values = codec.to_json(placed.event)
    at, name = values.pop("time", None), values.pop("event")
    return wire.TandemJobEvent(id=placed.position.id, job_id=job_id, at=at, event=name, data=values)
