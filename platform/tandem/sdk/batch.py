"""Batch inference from Python: `tandem.run_batch`, with a progress bar.

import tandem
summary = tandem.run_batch("questions.jsonl", model="my-adapter", output="answers", request={"max_tokens": 64})
print(summary.answered, summary.failed, summary.results)
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tandem.cluster.local import authentication
from tandem.config import BatchConfig
from tandem.engine.engines import find_engine
from tandem.errors import ConfigError
from tandem.sdk.address import find_api_url
from tandem.sdk.cluster import check_gpus, connected, open_cluster
from tandem.sdk.console import console
from tandem.sdk.progress import duration
from tandem.settings import export
from tandem.settings import settings as app_settings

if TYPE_CHECKING:
    from tandem.batch.app.api import BatchApi
    from tandem.batch.prepare import BatchRun, PreparedRun
    from tandem.batch.progress import Progress as BatchProgress
    from tandem.batch.progress import Summary

CPUS = 8
"""Logical CPUs of a local cluster; of more replicas as many as they take."""


def run_batch(
    input: str | Path | BatchConfig,  # noqa: A002 - what the command calls it
    *,
    model: str = "",
    output: str | Path = "",
    request: Mapping[str, Any] | None = None,
    api_url: str | None = None,
    api_key: str | None = None,
    **settings: Any,
) -> Summary:
    """Answer a file of rows, with a progress bar.

    Runs on the cluster that this process is connected to, else on RAY_ADDRESS's, this home's, or one for as long as it takes.
    With `on_app` the app that serves answers instead: the one at `api_url` (unset: TANDEM_API_URL, else the app of this home)
    with `api_key` (unset: TANDEM_API_KEY).

    `input` is a path or URI, or a whole BatchConfig; `settings` are other fields of one. Raises a TandemError before anything
    is started if something of the run is not there.
    """
    config = input if isinstance(input, BatchConfig) else BatchConfig(
        input=str(input), model=model, output=str(output), request=dict(request or {}), **settings
    )  # fmt: skip
    if config.on_app:
        from tandem.sdk.batch_api import OpenAIBatches

        with OpenAIBatches(find_api_url(api_url), api_key or app_settings().sent_key) as api:
            summary = _answered_on_app(config, api)
    elif api_url or api_key:
        raise ConfigError("--api-url and --api-key (api_url, api_key) are of an app. Add --on-app (on_app=True).")
    else:
        summary = _answered_by_engines(config)
    _say(summary)
    return summary


def _answered_by_engines(config: BatchConfig) -> Summary:
    from tandem.batch.prepare import prepare

    with _reading() as tell:
        run = prepare(config, tell)
    for name in without_template(run):
        console.print(
            f"[yellow]Rows with `prompt` go to {escape(name)} as they are, without its chat template.[/] --chat (chat=True) asks "
            "each as a user's message.",
            soft_wrap=True,
        )
    try:
        return _run(config, run)
    except (KeyboardInterrupt, SystemExit):
        console.print("\nStopped. The same command resumes where it stopped.")
        raise


def _answered_on_app(config: BatchConfig, api: BatchApi) -> Summary:
    from tandem.batch.app.prepare import prepare_on_app
    from tandem.batch.app.run import AppRun

    with _reading() as tell:
        prepared = prepare_on_app(config, api, tell)
    if prepared.manifest.finished:
        return AppRun(prepared, api).answer()
    with _Bar(prepared, "waiting for the app") as bar:
        run = AppRun(prepared, api, bar.tell)
        try:
            return run.answer()
        except (KeyboardInterrupt, SystemExit):
            run.cancel()
            console.print(
                "\nStopped, and its batches on the app are cancelled. What they have answered is kept: the same command asks the "
                "other rows."
            )
            raise


@contextlib.contextmanager
def _reading() -> Iterator[Callable[[int], None]]:
    """What tells how many rows have been read."""
    status = console.status("Reading the rows")

    def tell(rows: int) -> None:
        # Not before the first rows: a model that is downloaded has a bar of its own.
        status.start()
        status.update(f"Reading the rows: {rows:,}")

    try:
        yield tell
    finally:
        status.stop()


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

    def __init__(self, run: PreparedRun, waiting: str = "starting engines") -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
        )
        self._task = self._progress.add_task("Answering", total=run.survey.rows, numbers=f"[dim]{waiting}[/]")
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
        parts = [f"{now.tokens / past:,.0f} tok/s"] if past and now.tokens else []
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
