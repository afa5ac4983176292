"""A job's events as a person sees them: one live progress bar, and a line for each thing worth remembering."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tandem.observability import events

NOISE_KEPT = 200


class JobView:
    """Shows one job's log lines. `show` takes them one at a time; `ended` is the event that closed the job, if any."""

    def __init__(self, console: Console, title: str, *, raw: bool = False) -> None:
        self.console = console
        self.raw = raw
        self.ended: dict[str, Any] | None = None
        self.other_lines: list[str] = []
        """The newest lines of the log that are not events; shown when a job fails."""
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("[dim]left[/]"),
            TimeRemainingColumn(),
            console=console,
            disable=raw,
        )
        self._title = title
        self._task: TaskID | None = None
        self._announced = 0

    def __enter__(self) -> JobView:
        self._progress.start()
        self._task = self._progress.add_task(self._title, total=None, numbers="[dim]starting workers[/]")
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def follow(self, lines: Iterable[str]) -> None:
        """Show every line until there are no more."""
        for line in lines:
            self.show(line)

    def show(self, line: str) -> None:
        """Show one line of the job's log."""
        event = events.decode(line)
        if self.raw:
            self.console.print(line, markup=False, soft_wrap=True)
        if event is None:
            self.other_lines = [*self.other_lines[-NOISE_KEPT:], line]
            return
        if event["event"] in ("finished", "failed"):
            self.ended = event
        if not self.raw:
            self._show_event(event)

    def _show_event(self, event: dict[str, Any]) -> None:
        assert self._task is not None
        match event["event"]:
            case "started":
                resumed = f", resumed at step {event['resumed_from']}" if event.get("resumed_from") else ""
                trainable = event.get("trainable") or event.get("parameters") or 0
                self._say(
                    f"{event.get('parameters', 0):,} parameters, {trainable:,} trained; "
                    f"{event.get('workers')} workers, {event.get('strategy')}{resumed}"
                )
                self._progress.update(self._task, total=event.get("steps"), completed=event.get("resumed_from") or 0)
            case "step":
                numbers = f"loss [cyan]{event['loss']:.3f}[/]  {event.get('tokens_per_s') or 0:,.0f} tok/s"
                self._progress.update(self._task, completed=event["step"], total=event.get("steps"), numbers=numbers)
                # Where there is no terminal a bar shows nothing: say it in words, ten times a run.
                tenth = 10 * event["step"] // max(1, event.get("steps", 1))
                if not self.console.is_terminal and tenth > self._announced:
                    self._announced = tenth
                    self._say(f"step {event['step']}/{event.get('steps')}  {numbers}")
            case "evaluation":
                apart = ("event", "time", "step", "rows", "averaged")
                numbers = "  ".join(f"{key} {value:.4g}" for key, value in event.items() if key not in apart)
                self._say(f"evaluation at step {event['step']}: {escape(numbers)} ({event['rows']} rows)")
            case "checkpoint":
                self._progress.update(self._task, description=self._title)
            case "restart":
                self._say(f"[yellow]restarted[/]: {escape(str(event.get('reason', '')))}")
            case "finished":
                self._say(f"loss {event['loss']:.3f} after {event['steps']} steps, {event['seconds']:.0f} s")

    def _say(self, text: str) -> None:
        self._progress.console.print(f"  [dim]·[/] {text}")
