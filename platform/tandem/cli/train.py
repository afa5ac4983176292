"""`tandem train`: submit, list, follow and stop jobs; and the main function of the submit scripts."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tandem.cli.models import ago
from tandem.cli.support.shell import friendly_errors
from tandem.cli.sweep import say_sweep, sweep_command
from tandem.cluster.local import connect
from tandem.config import TrainConfig, load_yaml
from tandem.errors import ConfigError, JobError
from tandem.jobs.client import JobClient
from tandem.jobs.extend import extension_of
from tandem.jobs.folder import JobFolder, JobState, JobSummary, RunFolder, find_job, job_folders
from tandem.jobs.sweep import find_sweep, stop_sweep
from tandem.observability import codec
from tandem.sdk.console import console
from tandem.sdk.progress import duration, log_line
from tandem.sdk.training import submit
from tandem.train.reporting.plot import plot_run

DROPPED_FIRST = ("submitted", "model", "tok/s", "loss", "step")
"""Columns of the table of jobs that are dropped where it is too wide, in this order. Ids stay whole: people copy them."""
FOLDED = ("model", "submitted")
FOLDED_CHARS = 9
"""Least width of a column that folds."""

train_app = typer.Typer(no_args_is_help=True, help="Submit training jobs and watch over them.")

train_app.command("sweep")(sweep_command)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The job as YAML (see train_apps/recipes).")]
SetOption = Annotated[
    list[str], typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one value: -s steps=500")
]
DetachOption = Annotated[bool, typer.Option("--detach", "-d", help="Return at once; the job continues.")]
RawOption = Annotated[bool, typer.Option("--raw", help="Print the log as it is instead of a progress bar.")]


@train_app.command("submit")
def submit_command(
    config: ConfigOption,
    overrides: SetOption = [],  # noqa: B006  (typer copies it)
    detach: DetachOption = False,
    raw: RawOption = False,
) -> None:
    """Submit a training job, show its progress, and leave with its exit status."""
    with friendly_errors():
        raise SystemExit(submit(load_yaml(TrainConfig, config, overrides), detach=detach, raw=raw))


@train_app.command("extend")
def extend_command(
    job_id: Annotated[str, typer.Argument(help="The job to go on from, or `latest`.")],
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps to add.")],
    rewarm: Annotated[
        bool, typer.Option("--rewarm", help="Warm up and decay the learning rate anew, over the added steps.")
    ] = False,
    overrides: SetOption = [],  # noqa: B006  (typer copies it)
    detach: DetachOption = False,
    raw: RawOption = False,
) -> None:
    """Train further: a job of its own that goes on from the last checkpoint of one that has ended."""
    with friendly_errors():
        config = extension_of(find_job(job_id), steps, rewarm=rewarm, overrides=overrides)
        raise SystemExit(submit(config, detach=detach, raw=raw))


def submit_script(kind: str) -> None:
    """The main of `train_apps/*.py`: the same options as `tandem train submit`, for jobs of one kind (pretrain, sft or dpo)."""

    def main(
        config: ConfigOption,
        overrides: SetOption = [],  # noqa: B006
        detach: DetachOption = False,
        raw: RawOption = False,
    ) -> None:
        with friendly_errors():
            job = load_yaml(TrainConfig, config, overrides)
            if (kind == "dpo") != (job.objective == "dpo"):
                step = (
                    "Use train_apps/dpo.py."
                    if job.objective == "dpo"
                    else "Set objective: dpo, or use train_apps/sft.py."
                )
                raise ConfigError(f"{config}: objective is {job.objective!r} in a {kind} job. {step}")
            if kind == "sft" and job.model.base is None:
                raise ConfigError(
                    f"{config}: model.base is missing; fine-tuning starts from a model. See `tandem models ls`."
                )
            if kind == "pretrain" and job.lora is not None:
                raise ConfigError(
                    f"{config}: lora is set; a pretraining job trains the whole model. Use train_apps/sft.py."
                )
            raise SystemExit(submit(job, detach=detach, raw=raw))

    typer.run(main)


@train_app.command("status")
def status_command(
    job_id: Annotated[
        str | None, typer.Argument(help="A job's id, the start of one, or 'latest'. None: all jobs.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="With --plot: where the picture goes; unset: ID.png, here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    plot: Annotated[
        bool, typer.Option("--plot", help="Draw loss, learning rate and throughput of one job to FILE, a PNG.")
    ] = False,
) -> None:
    """Show one job or all of them: state, step, loss, throughput, result; of one, also workers, checkpoint and faults."""
    with friendly_errors():
        if plot or picture:
            _plot(job_id, picture, asked=plot)
            return
        if job_id and not as_json and (sweep := find_sweep(job_id)):
            submission = _submission_of(sweep)
            say_sweep(sweep, submission.client if submission else None)
            return
        jobs = [find_job(job_id)] if job_id else list(job_folders())
        summaries = [job.summary(live_state(job)) for job in jobs]
        if as_json:
            typer.echo(json.dumps([asdict(s) for s in summaries] if job_id is None else asdict(summaries[0]), indent=2))
        elif not summaries:
            console.print(
                "No jobs yet. `python train_apps/pretrain.py --config ...` or `tandem train submit` starts one."
            )
        else:
            _show(summaries)
            if job_id:
                for line in health_lines(summaries[0], time.time()):
                    console.print(f"  [dim]·[/] {escape(line)}", soft_wrap=True)
            if job_id and summaries[0].error:
                console.print(f"[red]{escape(summaries[0].error)}[/]")


def health_lines(s: JobSummary, now: float) -> list[str]:
    """How a job fares, in sentences."""
    lines = []
    if s.workers:
        lines.append(f"{s.workers} workers, {s.layout}")
    if s.checkpoint is not None:
        ago = f", {duration(now - s.checkpoint_at)} ago" if s.checkpoint_at else ""
        lines.append(f"last checkpoint: step {s.checkpoint}{ago}")
    if s.faults or s.restarts:
        told = ", ".join(f"{count} x {kind}" for kind, count in sorted(s.faults.items())) or "none"
        lines.append(f"faults: {told}; {s.restarts} restarts, {s.repeated_steps} steps computed twice")
    if s.skipped_steps:
        lines.append(f"{s.skipped_steps} steps skipped, because loss or gradients were not finite")
    return [*lines, *s.warnings]


def _plot(job_id: str | None, picture: Path | None, *, asked: bool) -> None:
    if not asked:
        raise ConfigError(f"{picture} is one argument too many; a file is given with --plot.")
    if job_id is None:
        raise ConfigError("--plot draws one job: `tandem train status ID --plot`. `tandem train status` lists them.")
    job = find_job(job_id)
    path = picture or Path(f"{job.id}.png")
    if path.is_dir():
        path = path / f"{job.id}.png"
    if not plot_run(job.typed_events(), path, title=job.config().name):
        raise JobError(f"{job.id} has not reported a step yet; there is nothing to draw.")
    console.print(f"Drawn: {escape(str(path))}", soft_wrap=True)


def live_state(job: JobFolder) -> JobState | None:
    """What the cluster that runs a job says of it; None if there is none, or it knows nothing of it."""
    submission = _submission_of(job)
    return submission.client.state(submission.id) if submission else None


class Submission(NamedTuple):
    """The newest submission of a job or sweep, on the cluster that is up."""

    client: JobClient
    id: str


def _submission_of(job: RunFolder) -> Submission | None:
    sent = job.submissions()
    if not sent:
        return None
    cluster = connect()
    return Submission(JobClient(cluster), str(sent[-1]["id"])) if cluster else None


def _show(summaries: list[JobSummary]) -> None:
    """Print the jobs as a table with whole ids; where it is too wide, without the first columns of DROPPED_FIRST."""
    rows = [_cells(summary) for summary in summaries]
    columns = list(rows[0])
    while _least_width(rows, columns) > console.width and len(columns) > 2:
        columns.remove(next(column for column in DROPPED_FIRST if column in columns))
    table = Table(box=None, header_style="bold")
    for column in columns:
        folds = column in FOLDED
        table.add_column(
            column,
            justify="right" if column in ("step", "loss", "tok/s") else "left",
            no_wrap=not folds,
            overflow="fold",
            min_width=FOLDED_CHARS if folds else None,
        )
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    console.print(table)
    dropped = [column for column in rows[0] if column not in columns]
    if dropped:
        console.print(f"[dim]Too narrow for {', '.join(dropped)}; --json has all.[/]")


def _least_width(rows: list[dict[str, Text]], columns: list[str]) -> int:
    """Characters that a table needs: columns whole, except those that fold, and a blank on each side."""
    widths = [
        FOLDED_CHARS if column in FOLDED else max(len(column), *(row[column].cell_len for row in rows))
        for column in columns
    ]
    return sum(widths) + 2 * len(columns)


def _cells(summary: JobSummary) -> dict[str, Text]:
    """A job's row, by the columns' names."""
    s = summary
    colour = {JobState.FINISHED: "green", JobState.FAILED: "red", JobState.RUNNING: "cyan", JobState.STOPPED: "yellow"}
    when = ago(datetime.fromtimestamp(s.submitted_at, UTC), datetime.now(UTC)) if s.submitted_at else ""
    return {
        "job": Text(s.id),
        "state": Text(str(s.state), colour.get(s.state, "white")),
        "step": Text(f"{s.step}/{s.steps}"),
        "loss": Text(f"{s.loss:.3f}" if s.loss is not None else ""),
        "tok/s": Text(f"{s.tokens_per_s:,.0f}" if s.tokens_per_s else ""),
        "model": Text(s.model or ""),
        "submitted": Text(when),
    }


@train_app.command("logs")
def logs_command(
    job_id: Annotated[str, typer.Argument(help="A job's id, the start of one, or 'latest'.")] = "latest",
    follow_it: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Events as JSON, one a line, and nothing else.")] = False,
) -> None:
    """Print a job's log: its events in words, and whatever else it wrote."""
    with friendly_errors():
        job: RunFolder = find_sweep(job_id) or find_job(job_id)
        submission = _submission_of(job)
        if submission is None or submission.client.state(submission.id) is None:
            # Its cluster is gone and took the log along; the events are in the folder.
            for values in job.events():
                _print_event(values, as_json)
            return
        client = submission.client
        for line in client.follow(submission.id) if follow_it else client.log_lines(submission.id):
            if (values_of_line := codec.decode(line)) is not None:
                _print_event(values_of_line, as_json)
            elif not as_json:
                typer.echo(line)


def _print_event(values: dict[str, Any], as_json: bool) -> None:
    """Print an event in words; as JSON if that is asked for, or if this release does not know its kind."""
    event = None if as_json else codec.from_json(values)
    typer.echo(json.dumps(values) if event is None else log_line(event))


@train_app.command("stop")
def stop_command(
    job_id: Annotated[str | None, typer.Argument(help="A job's id, or the start of one.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Stop all jobs that run on this cluster.")] = False,
) -> None:
    """Stop a job; submitting it again resumes from its newest checkpoint."""
    with friendly_errors():
        if (job_id is None) != every:
            raise ConfigError("Give either a job's id or --all.")
        if job_id is None:
            _stop_all()
            return
        if sweep := find_sweep(job_id):
            submission = _submission_of(sweep)
            if submission is None or not submission.client.running(sweep):
                raise JobError(f"{sweep.id} is not running.")
            stop_sweep(submission.client, sweep)
            console.print(f"Stopped {sweep.id} and its trials.")
            return
        job = find_job(job_id)
        submission = _submission_of(job)
        state = submission.client.state(submission.id) if submission else None
        if submission is None or state is None or state.over:
            raise JobError(f"{job.id} is not running; it is {job.summary(state).state}.")
        _stop(job, submission.client, submission.id)


def _stop(job: JobFolder, client: JobClient, submission: str) -> None:
    # Marked first: whoever follows it is not to submit it again.
    job.mark_stopped()
    client.stop(submission, timeout_s=job.leave_s + 30)
    console.print(f"Stopped {job.id}. The same command resumes from its newest checkpoint.")


def _stop_all() -> None:
    cluster = connect()
    if cluster is None:
        raise JobError("No cluster of this home is up, so no job runs.")
    client = JobClient(cluster)
    running = [(job, submission) for job in job_folders() if (submission := client.running(job)) is not None]
    for job, submission in running:
        _stop(job, client, submission)
    if not running:
        console.print("No job runs on this cluster.")
