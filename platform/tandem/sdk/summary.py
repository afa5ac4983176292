"""Summary of a finished job: location, metrics, duration, and the commands to serve and query the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape

from tandem.ids import split_version
from tandem.jobs.folder import JobFolder
from tandem.sdk.console import console
from tandem.sdk.progress import duration


def print_result(job: JobFolder) -> None:
    """Print the summary of a finished job."""
    end = job.finished() or {}
    model = end.get("model")
    console.print(
        f"  [green]✓[/] [bold]{escape(model or 'not registered')}[/] in {escape(str(job.export))}", soft_wrap=True
    )
    if numbers := result_figures(end):
        console.print(f"  [dim]·[/] {numbers}")
    rows = [("loss curve", str(job.plot))] if job.plot.exists() else []
    for what, value in (*rows, *commands(end)):
        console.print(f"  [dim]·[/] {what}: [cyan]{escape(value)}[/]", soft_wrap=True)


def result_figures(end: Mapping[str, Any]) -> str:
    """Loss, evaluation, tokens and time of a `finished` event; what it lacks is left out."""
    parts = []
    if (loss := end.get("loss")) is not None:
        parts.append(f"loss {loss:.3f}")
    if evaluation := end.get("evaluation"):
        perplexity = f" (perplexity {evaluation['perplexity']:.4g})" if "perplexity" in evaluation else ""
        parts.append(f"evaluation {evaluation['loss']:.3f}{perplexity}")
    if tokens := end.get("tokens"):
        parts.append(f"{tokens:,} tokens")
    if (seconds := end.get("seconds")) is not None:
        parts.append(duration(seconds))
    return ", ".join(parts)


def commands(end: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What to type to serve the model of a `finished` event and to ask it; nothing for one that is not registered."""
    model, base = end.get("model"), end.get("base")
    if not model:
        return []
    name = split_version(str(model))[0]
    if end.get("dora"):
        merged = f"{name}-merged"
        return [
            ("merge it", f"tandem models merge {name} {merged}"),
            ("serve it", f"tandem serve up {merged}"),
            ("ask it", f"tandem chat --model {merged}"),
        ]
    return [("serve it", f"tandem serve up {base or name}"), ("ask it", f"tandem chat --model {name}")]
