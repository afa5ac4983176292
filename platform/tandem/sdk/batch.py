"""Batch inference from Python: `tandem.run_batch`, with a progress bar.

import tandem
summary = tandem.run_batch("questions.jsonl", model="my-adapter", output="answers", request={"max_tokens": 64})
print(summary.answered, summary.failed, summary.results)
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tandem.cluster.local import authentication
from tandem.config import BatchConfig
from tandem.engine.engines import find_engine
from tandem.sdk.cluster import check_gpus, connected, open_cluster
from tandem.sdk.console import console
from tandem.sdk.progress import duration
from tandem.settings import export

if TYPE_CHECKING:
    from tandem.batch.prepare import BatchRun
    from tandem.batch.run import Progress as BatchProgress
    from tandem.batch.run import Summary

CPUS = 8
"""Logical CPUs of a local cluster; of more replicas as many as they take."""


def run_batch(
    input: str | Path | BatchConfig,  # noqa: A002 - what the command calls it
    *,
    model: str = "",
    output: str | Path = "",
    request: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Summary:
    """Answer a file of rows, with a progress bar.

    Runs on the cluster that this process is connected to, else on RAY_ADDRESS's, this home's, or one for as long as it takes.

    `input` is a path or URI, or a whole BatchConfig; `settings` are other fields of one. Raises a TandemError before anything
    is started if something of the run is not there.
    """
    from tandem.batch.prepare import prepare

    config = input if isinstance(input, BatchConfig) else BatchConfig(
        input=str(input), model=model, output=str(output), request=dict(request or {}), **settings
    )  # fmt: skip
    status = console.status("Reading the rows")

    def tell(rows: int) -> None:
        # Not before the first rows: a model that is downloaded has a bar of its own.
        status.start()
        status.update(f"Reading the rows: {rows:,}")

    try:
        run = prepare(config, tell)
    finally:
        status.stop()
    for name in without_template(run):
        console.print(
            f"[yellow]Rows with `prompt` go to {escape(name)} as they are, without its chat template.[/] --chat (chat=True) asks "
            "each as a user's message.",
            soft_wrap=True,
        )
    try:
        summary = _run(config, run)
    except (KeyboardInterrupt, SystemExit):
        console.print("\nStopped. The same command resumes where it stopped.")
        raise
    _say(summary)
    return summary


def without_template(run: BatchRun) -> list[str]:
    """Names of bases with a chat template whose rows hold plain prompts, which bypass the template."""
    asked = (spec for spec, _ in run.bases if spec.id in run.survey.bare_prompts and spec.path)
    return [
        spec.name for spec in asked if find_engine(spec.kind).model_features(Path(spec.path), spec.args).chat_template
    ]


def _run(config: BatchConfig, run: BatchRun) -> Summary:
    if run.manifest.finished or not run.units:
        # Nothing to ask of anybody. Ray reads how it authenticates when it is imported, and may be needed later.
        export(authentication())
        from tandem.batch.run import answer

        return answer(run)
    with _driver(config), _Bar(run) as bar:
        from tandem.batch.run import answer

        return answer(run, bar.tell)


@contextlib.contextmanager
def _driver(config: BatchConfig) -> Iterator[None]:
    """This process as a driver of a cluster. One that it is already stays as it is: the caller has actors there."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        yield
        return
    check_gpus(config.gpus_per_replica, "A replica", "gpus_per_replica")
    cpus = max(CPUS, int(config.replicas * config.cpus_per_replica) + 2)
    with open_cluster(num_cpus=cpus) as cluster, connected(cluster):
        yield


class _Bar:
    """Rows done, rows without an answer, tokens a second, time left."""

    def __init__(self, run: BatchRun) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
        )
        self._task = self._progress.add_task("Answering", total=run.survey.rows, numbers="[dim]starting engines[/]")
        self._found: int | None = None
        self._tenth = 0

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def tell(self, now: BatchProgress) -> None:
        """More rows are published."""
        if self._found is None:
            # What an earlier start had done says nothing of how fast this one is, nor does the start of engines.
            self._found = now.done
            if now.found:
                self._progress.console.print(f"  [dim]·[/] {now.found:,} of {now.rows:,} rows are there already")
            if now.failed:
                self._progress.console.print(
                    f"  [dim]·[/] {now.failed:,} of {now.rows:,} rows cannot be asked; why will be in the errors"
                )
            self._progress.update(self._task, completed=now.done)
            return
        past, rows = now.answering_s, now.done - self._found
        parts = [f"{now.tokens / past:,.0f} tok/s"] if past else []
        if now.failed:
            parts.append(f"[yellow]{now.failed:,} failed[/]")
        if rows:
            parts.append(f"[dim]{duration(past * (now.rows - now.done) / rows)} left[/]")
        numbers = "  ".join(parts)
        self._progress.update(self._task, completed=now.done, numbers=numbers)
        # Where there is no terminal a bar shows nothing: say it in words, ten times a run.
        tenth = 10 * now.done // now.rows
        if not console.is_terminal and tenth > self._tenth:
            self._tenth = tenth
            self._progress.console.print(f"  [dim]·[/] {now.done:,} of {now.rows:,} rows  {numbers}")


def _say(summary: Summary) -> None:
    seconds = f" in {duration(summary.seconds)}" if summary.seconds else ", as before"
    console.print(
        f"[green]{summary.answered:,}[/] of {summary.rows:,} rows answered{seconds}: {escape(summary.results)}"
    )
    if summary.failed:
        console.print(f"[yellow]{summary.failed:,}[/] rows have no answer; why is in {escape(summary.errors)}")
