"""Summary of a finished job: location, metrics, duration, and the commands to serve and query the model."""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass
from urllib.parse import quote

from rich.markup import escape

from tandem.cluster.local import Cluster, connect
from tandem.cluster.machine import gpus
from tandem.config import AUTO_ENGINE, ServeConfig
from tandem.engine.engines import select_engine, unsupported_shape
from tandem.errors import TandemError
from tandem.ids import split_version
from tandem.jobs.folder import JobFolder
from tandem.observability.events import Finished
from tandem.registry import find_base
from tandem.sdk.console import console
from tandem.sdk.progress import duration
from tandem.sdk.serving import listener_url, serve_details, served_models

ANSWER_TIMEOUT_S = 2.0
"""Seconds for the app that is up to say whether it knows a model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningApp:
    """The app that is up, if one is."""

    url: str
    models: tuple[str, ...]
    answers: bool
    """Whether it answers requests for the job's model or adapter already."""


def print_result(job: JobFolder, cluster: Cluster | None = None) -> None:
    """Print the summary of a finished job; `cluster`: where an app may be up, else the one of this home or RAY_ADDRESS."""
    end = job.finished() or Finished()
    model = end.model
    console.print(
        f"  [green]✓[/] [bold]{escape(model or 'not registered')}[/] in {escape(str(job.export))}", soft_wrap=True
    )
    if numbers := result_figures(end):
        console.print(f"  [dim]·[/] {numbers}")
    rows = [("loss curve", str(job.plot))] if job.plot.exists() else []
    if reason := unserved_reason(job, end):
        hints = []
        console.print(f"  [dim]·[/] [yellow]It cannot be served on this machine.[/] {escape(reason)}", soft_wrap=True)
    else:
        hints = commands(end, _running_app(model, cluster) if model else None)
    for what, value in (*rows, *hints):
        console.print(f"  [dim]·[/] {what}: [cyan]{escape(value)}[/]", soft_wrap=True)


def unserved_reason(job: JobFolder, end: Finished) -> str | None:
    """The reason why the engine of a job's result cannot serve it on this machine; None: no reason is known."""
    try:
        folder = find_base(end.base).path if end.base else job.export
        return unsupported_shape(select_engine(AUTO_ENGINE, folder), folder, float(len(gpus())))
    except TandemError:
        return None


def _running_app(model: str, cluster: Cluster | None) -> RunningApp | None:
    # What is up decides about a hint only, so no failure to find out is an error here.
    try:
        cluster = cluster or connect()
        details = serve_details(cluster) if cluster is not None else {}
    except (TandemError, OSError, RuntimeError):
        return None
    app = ServeConfig().app
    if app not in details.get("applications", {}):
        return None
    url = listener_url(details, cluster)
    return RunningApp(url=url, models=tuple(served_models(details, app)), answers=_answers(url, model))


def _answers(url: str, model: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/models/{quote(model)}", timeout=ANSWER_TIMEOUT_S) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def result_figures(end: Finished) -> str:
    """Loss, evaluation, tokens and time of a finished job, as far as the event has them."""
    parts = []
    if end.loss is not None:
        parts.append(f"loss {end.loss:.3f}")
    if evaluation := end.evaluation:
        perplexity = f" (perplexity {evaluation['perplexity']:.4g})" if "perplexity" in evaluation else ""
        parts.append(f"evaluation {evaluation['loss']:.3f}{perplexity}")
    if end.tokens:
        parts.append(f"{end.tokens:,} tokens")
    if end.seconds is not None:
        parts.append(duration(end.seconds))
    return ", ".join(parts)


def commands(end: Finished, app: RunningApp | None = None) -> list[tuple[str, str]]:
    """The commands that serve and query a finished job's model; none for one that is not registered.

    `app`: the app that is up. One that answers for the model already needs no change; another one is changed, not started.
    """
    if not end.model:
        return []
    name = split_version(end.model)[0]
    if end.dora:
        merged = f"{name}-merged"
        return [
            ("merge it", f"tandem models merge {name} {merged}"),
            ("serve it", _serve_command(merged, app)),
            ("ask it", f"tandem chat --model {merged}"),
        ]
    if app is not None and app.answers:
        return [(f"{app.url} answers for it already; ask it", f"tandem chat --model {name}")]
    return [("serve it", _serve_command(end.base or name, app)), ("ask it", f"tandem chat --model {name}")]


def _serve_command(model: str, app: RunningApp | None) -> str:
    if app is None:
        return f"tandem serve up {model}"
    # A name that is served already comes to mean its newest version.
    others = [each for each in app.models if each != split_version(model)[0]]
    return f"tandem serve deploy {' '.join([*others, model])}"
