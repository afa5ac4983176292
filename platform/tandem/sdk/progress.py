"""Progress display of a job: a bar with metrics, and one line for each notable event."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from datetime import datetime

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from tandem.observability.codec import decode, from_json, to_json
from tandem.observability.events import (
    CheckpointRegistered,
    CheckpointSaved,
    Evaluated,
    Event,
    Failed,
    FaultDetected,
    Finished,
    HangDetected,
    Notice,
    RegistrationFailed,
    Resized,
    Restarted,
    RolledBack,
    SlowRank,
    Started,
    Step,
    StepSkipped,
    Stopped,
)

NOISE_KEPT = 200
REPORTS_KEPT = 30
"""Reports that the time to finish is reckoned from: speed changes when another job comes or goes."""


class JobView:
    """Shows one job's log lines. `show` takes them one at a time; `ended` is the event that closed the job, if any."""

    def __init__(self, console: Console, title: str, *, raw: bool = False) -> None:
        self.console = console
        self.raw = raw
        self.ended: Finished | Failed | Stopped | None = None
        self.other_lines: list[str] = []
        """The newest lines of the log that are not events; shown when a job fails."""
        self._progress = _Bar(
            TextColumn(
                "[bold]{task.description}", table_column=Column(max_width=24, overflow="ellipsis", no_wrap=True)
            ),
            BarColumn(bar_width=20),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
            console=console,
            disable=raw,
        )
        self._title = title
        self._task: TaskID | None = None
        self._announced = 0
        self._eta = EtaEstimator()

    def __enter__(self) -> JobView:
        self._progress.start()
        self._task = self._progress.add_task(self._title, total=None, left="[dim]starting workers[/]", numbers="")
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def follow(self, lines: Iterable[str]) -> None:
        """Show every line until there are no more."""
        for line in lines:
            self.show(line)

    def show(self, line: str) -> None:
        """Show one line of the job's log."""
        values = decode(line)
        if self.raw:
            self.console.print(line, markup=False, soft_wrap=True)
        if values is None:
            self.other_lines = [*self.other_lines[-NOISE_KEPT:], line]
            return
        event = from_json(values)
        if isinstance(event, Finished | Failed | Stopped):
            self.ended = event
        if event is not None and not self.raw:
            self._show_event(event)

    def _show_event(self, event: Event) -> None:
        assert self._task is not None
        match event:
            case Started():
                self._say(str(event_sentence(event)))
                self._progress.update(self._task, total=event.steps or None, completed=event.resumed_from or 0)
            case Step():
                numbers = described(event)
                remaining_s = self._eta.remaining_s(event)
                self._progress.update(
                    self._task,
                    completed=event.step,
                    total=event.steps or None,
                    numbers=numbers,
                    left="" if remaining_s is None else f"[dim]{duration(remaining_s)} left[/]",
                )
                # Where there is no terminal a bar shows nothing: say it in words, ten times a run.
                tenth = 10 * event.step // max(1, event.steps)
                if not self.console.is_terminal and tenth > self._announced:
                    self._announced = tenth
                    self._say(f"step {event.step}/{event.steps}  {numbers}")
            case _:
                if (text := event_sentence(event)) is not None:
                    self._say(text)

    def _say(self, text: str) -> None:
        # In a file or a pipe a line stays one line, whatever the width that rich assumes for it.
        self._progress.console.print(f"  [dim]·[/] {text}", soft_wrap=not self.console.is_terminal)


class _Bar(Progress):
    """A bar, and its numbers on a line of their own: both on one do not fit into 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields.get("numbers"):
                line = Text.from_markup(f"  {task.fields['numbers']}")
                line.no_wrap, line.overflow = True, "ellipsis"
                yield line


class EtaEstimator:
    """Reckons the time to finish from a job's own clock, which is right also when its log is read late."""

    def __init__(self) -> None:
        self._reports: deque[tuple[int, float]] = deque(maxlen=REPORTS_KEPT)

    def remaining_s(self, event: Step) -> float | None:
        """Seconds until the last step, after this event; None as long as there is only one."""
        now = (event.step, event.seconds or 0.0)
        if self._reports and now <= self._reports[-1]:
            # A restart: neither its steps nor its clock go on from here.
            self._reports.clear()
        self._reports.append(now)
        (step, seconds), (then, before) = now, self._reports[0]
        if step == then or seconds <= before:
            return None
        return max(0, (event.steps or step) - step) * (seconds - before) / (step - then)


def event_sentence(event: Event) -> str | None:
    """An event as one line of rich markup; None for those that only other processes need."""
    match event:
        case Started():
            resumed = f", resumed at step {event.resumed_from}" if event.resumed_from else ""
            return (
                f"{event.parameters:,} parameters, {event.trainable or event.parameters:,} trained; "
                f"{event.workers} workers{on_nodes(event)}, {event.layout}{resumed}"
            )
        case Step():
            return f"step {event.step}/{event.steps}  {described(event)}"
        case Evaluated():
            return evaluated(event)
        case Restarted():
            return f"[yellow]restarted[/]: {escape(event.reason)}"
        case Resized():
            return f"[yellow]{event.from_workers} -> {event.to_workers} workers[/]: {escape(event.reason)}"
        case HangDetected() | SlowRank() | StepSkipped() | RolledBack() | Stopped():
            return f"[yellow]{escape(event.reason)}[/]"
        case Notice():
            return f"[yellow]{escape(event.message)}[/]"
        case CheckpointRegistered():
            return f"step {event.step} can be requested as [bold]{escape(event.model)}[/]"
        case RegistrationFailed():
            return f"[yellow]not registered[/]: {escape(event.error)}"
        case Finished():
            return f"loss {_number(event.loss)} after {event.steps} steps, {event.seconds or 0.0:.0f} s"
    return None


def log_line(event: Event) -> str:
    """An event as a line of a log, without colours: its time, and all of what `event_sentence` says of it or its fields."""
    match event:
        case CheckpointSaved():
            text = f"checkpoint of step {event.step}: {event.path}"
        case FaultDetected():
            text = f"fault ({event.kind}): {event.reason}"
        case Failed():
            text = f"failed: {event.error}"
        case _:
            said = event_sentence(event)
            fields = ", ".join(
                f"{key} {value}" for key, value in to_json(event).items() if key not in ("event", "time")
            )
            text = Text.from_markup(said).plain if said is not None else f"{event.name}: {fields}"
    at = datetime.fromtimestamp(event.time or 0.0).astimezone()
    return f"{at:%Y-%m-%d %H:%M:%S}  {text}"


def on_nodes(event: Started) -> str:
    """` on 2 nodes`; empty for one node."""
    return f" on {event.nodes} nodes" if (event.nodes or 1) > 1 else ""


def described(event: Step) -> str:
    """The numbers of a step in one line of at most 78 columns, without those that the event lacks."""
    parts = [f"loss [cyan]{_number(event.loss)}[/]"]
    if event.grad_norm is not None:
        parts.append(f"grad norm {event.grad_norm:.3g}")
    parts.append(f"{event.tokens_per_s or 0:,.0f} tok/s")
    if event.mfu is not None:
        parts.append(f"MFU {100 * event.mfu:.1f} %")
    if event.memory_bytes is not None:
        parts.append(f"{event.memory_bytes / 2**30:.2f} GiB")
    return "  ".join(parts)


def evaluated(event: Evaluated) -> str:
    """An evaluation in words."""
    others = {key: value for key, value in event.measured.items() if key != "loss"}
    listed = "".join(f", {key.replace('_', ' ')} {value:.4g}" for key, value in others.items())
    rows = f" ({event.rows} rows)" if event.rows else ""
    return f"evaluation at step {event.step}: loss [cyan]{_number(event.measured.get('loss'))}[/]{escape(listed)}{rows}"


def _number(loss: float | None) -> str:
    return "unknown" if loss is None else f"{loss:.3f}"


def duration(seconds: float) -> str:
    """`45 s`, `3:05 min`, `2:07 h` or `3 d 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    minutes = whole // 60
    if minutes < 48 * 60:
        return f"{minutes // 60}:{minutes % 60:02} h"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
