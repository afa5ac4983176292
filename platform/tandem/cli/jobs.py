"""`tandem jobs`: jobs of a served app and its queue, by URL and key, from any machine."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from tandem.api import jobs as wire
from tandem.cli.support.shell import friendly_errors
from tandem.jobs.work.states import JobKind, State
from tandem.sdk.app_client import Client
from tandem.sdk.console import console, print_message

jobs_app = typer.Typer(
    no_args_is_help=True,
    help="Jobs of a served app, and its queue. By URL and key: these commands need no cluster on this machine.",
)

Job = Annotated[str, typer.Argument(help="The id of a job.")]
Url = Annotated[str | None, typer.Option(help="The app; TANDEM_API_URL, or the app of this home.")]
Key = Annotated[str | None, typer.Option(help="Its key; TANDEM_API_KEY.")]
Tenant = Annotated[str | None, typer.Option(help="Only jobs of this tenant; with an admin's key.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until it ends.")]


@contextlib.contextmanager
def connected(api_url: str | None, api_key: str | None) -> Iterator[Client]:
    """The client of a command."""
    with friendly_errors(), Client(api_url, api_key=api_key) as client:
        yield client


@jobs_app.command("ls")
def list_command(
    kind: Annotated[list[JobKind] | None, typer.Option(help="Only of this kind; repeatable.")] = None,
    state: Annotated[list[State] | None, typer.Option(help="Only in this state; repeatable.")] = None,
    parent: Annotated[str | None, typer.Option(help="Only those that go on from this job.")] = None,
    tenant: Tenant = None,
    limit: Annotated[int, typer.Option(min=1, help="Show at most so many.")] = 50,
    api_url: Url = None,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """List jobs of every kind, newest first."""
    with connected(api_url, api_key) as client:
        found = client.jobs.list(
            kinds=[each.value for each in kind or ()],
            states=[each.value for each in state or ()],
            parent=parent,
            tenant=tenant,
        )
        shown = list(itertools.islice(found, limit + 1))
        if as_json:
            console.print_json(json.dumps([job.model_dump(mode="json") for job in shown[:limit]]))
        elif not shown:
            console.print("There is no such job.")
        else:
            console.print(_table(shown[:limit]))
            if len(shown) > limit:
                console.print(f"[dim]There are more: --limit {2 * limit}[/]")


@jobs_app.command("show")
def show_command(job: Job, api_url: Url = None, api_key: Key = None, as_json: Json = False) -> None:
    """Show a job: state, attempts, resources, and what it was made from."""
    with connected(api_url, api_key) as client:
        found, lineage = client.jobs.get(job), client.jobs.lineage(job)
        if as_json:
            both = found.model_dump(mode="json") | {"lineage": lineage.model_dump(mode="json")}
            console.print_json(json.dumps(both))
        else:
            console.print(_details(found, lineage))


@jobs_app.command("cancel")
def cancel_command(job: Job, api_url: Url = None, api_key: Key = None) -> None:
    """End a job: at once where it waits, else as soon as nothing of it runs."""
    _change(job, "cancel", api_url, api_key)


@jobs_app.command("pause")
def pause_command(job: Job, api_url: Url = None, api_key: Key = None) -> None:
    """Let a job save a checkpoint and leave, until it is resumed."""
    _change(job, "pause", api_url, api_key)


@jobs_app.command("resume")
def resume_command(job: Job, api_url: Url = None, api_key: Key = None) -> None:
    """Put a paused job into the queue again; it goes on from its last checkpoint."""
    _change(job, "resume", api_url, api_key)


@jobs_app.command("requeue")
def requeue_command(job: Job, api_url: Url = None, api_key: Key = None) -> None:
    """Run a job again that failed, expired or was cancelled; its failures are counted anew."""
    _change(job, "requeue", api_url, api_key)


@jobs_app.command("hold")
def hold_command(job: Job, api_url: Url = None, api_key: Key = None) -> None:
    """Keep a job that waits from starting."""
    _change(job, "hold", api_url, api_key)


@jobs_app.command("release")
def release_command(job: Job, api_url: Url = None, api_key: Key = None) -> None:
    """Let a held job start."""
    _change(job, "release", api_url, api_key)


@jobs_app.command("logs")
def logs_command(
    job: Job,
    attempt: Annotated[int | None, typer.Option(min=1, help="Of this attempt. Without: the newest.")] = None,
    line: Annotated[int, typer.Option(min=1, help="From this line on.")] = 1,
    follow: Follow = False,
    api_url: Url = None,
    api_key: Key = None,
) -> None:
    """Print the log of a job's newest attempt."""
    with connected(api_url, api_key) as client:
        for each in client.jobs.logs(job, attempt=attempt, line=line, follow=follow):
            print_message(each.text)


@jobs_app.command("events")
def events_command(
    job: Job,
    after: Annotated[str | None, typer.Option(metavar="ID", help="Only those after the event with this id.")] = None,
    follow: Follow = False,
    api_url: Url = None,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Print the events of a job, oldest first: changes of its state, steps, checkpoints, faults."""
    with connected(api_url, api_key) as client:
        for event in client.jobs.events(job, after=after, follow=follow):
            print_message(event.model_dump_json() if as_json else _event_line(event))


@jobs_app.command("metrics")
def metrics_command(
    job: Job,
    name: Annotated[list[str] | None, typer.Option(help="Only of this name, such as loss; repeatable.")] = None,
    api_url: Url = None,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Show the newest value of each metric of a training job; with --json all values."""
    with connected(api_url, api_key) as client:
        found = client.jobs.metrics(job, names=name or ())
        if as_json:
            console.print_json(found.model_dump_json())
        elif not any(series.steps for series in found.series):
            console.print("The job has reported no metrics.")
        else:
            table = _columns("METRIC", "STEP", "VALUE", "VALUES")
            for series in found.series:
                newest = "-" if series.values[-1] is None else f"{series.values[-1]:.6g}"
                table.add_row(escape(series.name), str(series.steps[-1]), newest, str(len(series.steps)))
            console.print(table)


@jobs_app.command("queue")
def queue_command(tenant: Tenant = None, api_url: Url = None, api_key: Key = None, as_json: Json = False) -> None:
    """Show how many jobs are in each state, and which wait, with the reasons."""
    with connected(api_url, api_key) as client:
        queue = client.jobs.queue(tenant=tenant)
        if as_json:
            console.print_json(queue.model_dump_json())
            return
        counts = _columns("KIND", "STATE", "JOBS")
        for count in queue.jobs:
            counts.add_row(count.kind, count.state, str(count.count))
        for state, requests in queue.requests.items():
            counts.add_row("request of a batch", state, str(requests))
        console.print(counts)
        if queue.waiting:
            waiting = _columns("WAITS", "PRIORITY", "SINCE (UTC)", "REASON")
            for job in queue.waiting:
                waiting.add_row(escape(job.id), str(job.priority), _time(job.created_at), escape(job.reason or "-"))
            console.print(waiting)


@jobs_app.command("capacity")
def capacity_command(tenant: Tenant = None, api_url: Url = None, api_key: Key = None, as_json: Json = False) -> None:
    """Show CPUs and GPUs of the app's cluster: total, used, free, by type of node, and the share of each tenant."""
    with connected(api_url, api_key) as client:
        found = client.capacity(tenant=tenant)
        if as_json:
            console.print_json(found.model_dump_json())
            return
        sums = _columns("", "CPUS", "GPUS")
        for name in ("total", "serving", "training", "free", "cordoned"):
            amounts: wire.TandemAmounts = getattr(found, name)
            sums.add_row(name, f"{amounts.cpus:g}", f"{amounts.gpus:g}")
        console.print(sums)
        if len(found.node_types) > 1:
            types = _columns("NODE TYPE", "NODES", "CPUS FREE", "GPUS FREE")
            for each in found.node_types:
                free = (f"{each.free.cpus:g} of {each.total.cpus:g}", f"{each.free.gpus:g} of {each.total.gpus:g}")
                types.add_row(escape(each.node_type or "-"), str(each.nodes), *free)
            console.print(types)
        shares = _columns("TENANT", "CPUS", "GPUS", "QUOTA CPUS", "QUOTA GPUS", "SHARE")
        for tenant_share in found.tenants:
            held = (tenant_share.used, tenant_share.quota)
            cells = (f"{value:g}" for each in held for value in (each.cpus, each.gpus))
            shares.add_row(escape(tenant_share.tenant or "-"), *cells, f"{tenant_share.share:.0%}")
        if found.tenants:
            console.print(shares)
        console.print(f"[dim]As of {found.age_s:.0f} s ago.[/]")


def _change(job: str, action: wire.JobAction, api_url: str | None, api_key: str | None) -> None:
    with connected(api_url, api_key) as client:
        changed = getattr(client.jobs, action)(job)
        console.print(f"{escape(changed.id)} is {changed.state}.")


def _table(jobs: list[wire.TandemJob]) -> Table:
    table = _columns("JOB", "KIND", "STATE", "TENANT", "CREATED (UTC)", "REASON")
    for job in jobs:
        cells = (job.kind, job.state, job.tenant or "-", _time(job.created_at), job.error or job.reason or "-")
        table.add_row(f"[bold]{escape(job.id)}[/]", *map(escape, cells))
    return table


def _details(job: wire.TandemJob, lineage: wire.TandemLineage) -> Table:
    size = f"{job.min_workers}" if job.min_workers == job.max_workers else f"{job.min_workers} to {job.max_workers}"
    rows = {
        "job": job.id,
        "kind": job.kind,
        "name": job.name,
        "tenant": job.tenant,
        "state": job.state,
        "reason": job.reason,
        "error": job.error,
        "priority": str(job.priority),
        "attempts": f"{job.attempt}; {job.failures} of at most {job.max_attempts} failed",
        "workers": f"{size}, each {job.cpus_per_worker:g} CPUs and {job.gpus_per_worker:g} GPUs",
        "created": _time(job.created_at),
        "started": _time(job.started_at),
        "ended": _time(job.ended_at),
        "deadline": _time(job.deadline),
        "base": lineage.base,
        "datasets": "\n".join(f"{each.role}: {each.location}" for each in lineage.datasets),
        "goes on from": lineage.parent,
        "goes on in": "\n".join(lineage.children),
        "result": lineage.result_model,
    }
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value:
            table.add_row(name, escape(value))
    return table


def _event_line(event: wire.TandemJobEvent) -> str:
    said = " ".join(f"{name}={_short(value)}" for name, value in event.data.items() if value not in (None, "", [], {}))
    return f"{_time(event.at)}  {event.event:<12} {said}"


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _columns(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
