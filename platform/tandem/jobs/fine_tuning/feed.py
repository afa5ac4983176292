"""Feed of a fine-tuning job's events, for streams that follow it until it ends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tandem.api.openai import fine_tuning as wire
from tandem.jobs.fine_tuning.progress import next_events
from tandem.jobs.fine_tuning.reports import reports
from tandem.jobs.fine_tuning.view import creation_report, end_report, report_to_wire, start_report
from tandem.jobs.tracking.feeds import Chunk
from tandem.jobs.tracking.line_file import START, Line
from tandem.jobs.work.records import Job
from tandem.jobs.work.store import JobStore


@dataclass(slots=True)
class FineTuningFeed:
    """The events of one job, oldest first."""

    store: JobStore
    job: Job
    journal: Path
    _line: Line = START
    _num_events: int = 0
    """Of the training, so far."""
    _was_created: bool = False
    _was_started: bool = False

    def next(self) -> Chunk[wire.FineTuningEvent]:
        """See `Feed`."""
        # Before the journal: what is written at the job's end is then read.
        self.job = job = self.store.get(self.job.id)
        told = []
        if not self._was_created:
            told.append(creation_report(job))
            self._was_created = True
        if not self._was_started and job.started_at is not None:
            told.append(start_report(job))
            self._was_started = True
        events, line = next_events(self.journal, self._line)
        has_more, self._line = line != self._line, line
        told += reports(events, first=self._num_events)
        self._num_events += len(events)
        ended = job.state.ended and not has_more
        if ended and (end := end_report(job, self._num_events)) is not None:
            told.append(end)
        return Chunk(items=[report_to_wire(job, report) for report in told], has_more=has_more, ended=ended)
