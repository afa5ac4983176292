"""`tandem slurm submit`: apps, training and sweeps as jobs of a Slurm cluster."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from typing import Annotated

import typer
from rich.markup import escape

from tandem.cli.slurm.show import show_connection
from tandem.cli.slurm.site import SetOption, SiteOption
from tandem.cli.support.shell import friendly_errors
from tandem.cli.sweep import (
    ConfigOption,
    MetricOption,
    OverridesOption,
    ParamsOption,
    SeedOption,
    SweepRequest,
    TrialsOption,
    say_swept,
)
from tandem.cluster.slurm import commands
from tandem.cluster.slurm.folder import JobFolder, Submission, find
from tandem.cluster.slurm.script import exports, render
from tandem.cluster.slurm.submission import make_request, write_files
from tandem.config.slurm import SlurmSite
from tandem.errors import ClusterError, ConfigError
from tandem.sdk.console import console
from tandem.sdk.slurm import read_site
from tandem.settings import settings

POLL_S = 1.0

submit_app = typer.Typer(no_args_is_help=True, help="Submit a job.")
NodesOption = Annotated[int, typer.Option("--nodes", "-N", min=1, help="Number of nodes.")]
GpusOption = Annotated[int, typer.Option("--gpus-per-node", min=0, help="GPUs on each node.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print the batch script, without secrets, and submit nothing.")
]
DetachOption = Annotated[bool, typer.Option("--detach", "-d", help="Return once it is submitted.")]


@submit_app.command("serve", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def serve_command(
    context: typer.Context,
    nodes: NodesOption = 1,
    gpus_per_node: GpusOption = 0,
    port: Annotated[int, typer.Option(min=1024, max=65535, help="The app's port on its node.")] = 8000,
    successor_of: Annotated[
        str | None, typer.Option(metavar="JOB", help="A job whose tunnels lead to this one once it answers.")
    ] = None,
    site: SiteOption = None,
    overrides: SetOption = [],  # noqa: B006
    dry_run: DryRunOption = False,
    detach: DetachOption = False,
) -> None:
    """Serve models as a job: `tandem slurm submit serve MODEL`. All else is passed on to `tandem serve up`."""
    with friendly_errors():
        submission = Submission(
            kind="serve",
            command=("serve", "up", *context.args),
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            port=port,
            succeeds=find(settings().root, successor_of).name if successor_of else None,
        )
        _submit(submission, read_site(site, overrides), dry_run=dry_run, detach=detach)


@submit_app.command("train", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def train_command(
    context: typer.Context,
    nodes: NodesOption = 1,
    gpus_per_node: GpusOption = 0,
    site: SiteOption = None,
    overrides: SetOption = [],  # noqa: B006
    dry_run: DryRunOption = False,
    detach: DetachOption = False,
) -> None:
    """Train as a job: `tandem slurm submit train --config FILE`. All else is passed on to `tandem train submit`.

    Before the time limit it writes a checkpoint and is queued again, until it is done.
    """
    with friendly_errors():
        command = ("train", "submit", *context.args)
        submission = Submission(kind="train", command=command, nodes=nodes, gpus_per_node=gpus_per_node)
        _submit(submission, read_site(site, overrides), dry_run=dry_run, detach=detach)


@submit_app.command("sweep")
def sweep_command(
    config: ConfigOption,
    params: ParamsOption,
    trials: TrialsOption = None,
    metric: MetricOption = "loss",
    seed: SeedOption = 0,
    config_overrides: OverridesOption = [],  # noqa: B006
    at_once: Annotated[int, typer.Option(min=0, help="Trials at once, at most; 0: as many as there is room for.")] = 0,
    nodes: NodesOption = 1,
    gpus_per_node: GpusOption = 0,
    site: SiteOption = None,
    overrides: SetOption = [],  # noqa: B006
    dry_run: DryRunOption = False,
) -> None:
    """Run a sweep as a job array, a trial in each task: the trials and the result are those of `tandem train sweep`.

    Trials of an earlier run that have finished are not run again. `--nodes` and `--gpus-per-node` are those of each trial.
    """
    with friendly_errors():
        if settings().database_url is None and at_once != 1:
            raise ConfigError(
                "Tasks of an array run on several nodes at a time, and TANDEM_DATABASE_URL is not set. Set it to a PostgreSQL "
                "database, or run one trial after the other: --at-once 1."
            )
        request = SweepRequest(
            config=config, params=params, trials=trials, metric=metric, seed=seed, overrides=config_overrides
        )
        sweep = request.prepare(parallel=at_once or None)
        if end := sweep.finished():
            say_swept(sweep, end)
            return
        # Imported here: they import what trains.
        from tandem.jobs.sweep_result import finish_if_over
        from tandem.sdk.slurm_sweep import begin

        tasks = tuple(number for number, job in enumerate(sweep.jobs(), 1) if not job.finished())
        if not tasks and (end := finish_if_over(sweep)):
            say_swept(sweep, end)
            return
        submission = Submission(
            kind="sweep",
            command=("slurm", "trial", sweep.id),
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            tasks=tasks,
            tasks_at_once=at_once,
        )
        if not dry_run:
            commands.require()
            begin(sweep, at_once=at_once)
        _submit(submission, read_site(site, overrides), dry_run=dry_run, detach=True)
        if not dry_run:
            console.print(f"`tandem train status {sweep.id}` shows its {len(tasks)} trials.", soft_wrap=True)


def _submit(submission: Submission, site: SlurmSite, *, dry_run: bool, detach: bool) -> None:
    home = settings().root
    if any(character.isspace() for character in str(home)):
        raise ConfigError(f"TANDEM_HOME is {str(home)!r}; for Slurm its path must be without spaces.")
    if not dry_run:
        commands.require()
    submission = replace(submission, time=site.time)
    folder = JobFolder(home / "slurm" / "example") if dry_run else JobFolder.create(home, submission)
    request = make_request(submission, folder, site)
    script = render(site, request)
    if dry_run:
        typer.echo(script)
        typer.echo(f"# {folder.environment}, which nobody else can read:")
        typer.echo("\n".join(f"# {line}" for line in exports(site, request.variables, hidden=True)))
        return
    write_files(request, site)
    for number in submission.tasks:
        single = replace(folder.submission(), command=(*submission.command, str(number)), tasks=(), tasks_at_once=0)
        folder.create_task(number, single)
    try:
        job_id = commands.submit(folder.script)
    except ClusterError:
        shutil.rmtree(folder.path)
        raise
    folder.write_job_id(job_id)
    console.print(f"Job {job_id} is submitted. Its script and output are in {escape(str(folder.path))}.")
    if not detach:
        _wait(folder, job_id)


def _wait(folder: JobFolder, job_id: str) -> None:
    """Wait until a job's app answers (or its training runs); ClusterError if it ends before."""
    with console.status("") as status:
        while True:
            connection, state = folder.connection(), commands.state(job_id)
            if connection.state == "ready":
                break
            if connection.state == "failed":
                raise ClusterError(
                    f"Job {job_id} has failed: {connection.message} `tandem slurm logs {job_id}` shows its output."
                )
            if state is None or state.is_over:
                word = state.state if state else "gone"
                raise ClusterError(f"Job {job_id} is {word}; `tandem slurm logs {job_id}` shows its output.")
            status.update(f"Job {job_id}: {state.state.lower()}" + (f" ({state.reason})" if state.reason else ""))
            time.sleep(POLL_S)
    show_connection(connection, folder)
