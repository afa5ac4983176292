"""`tandem slurm`: submit jobs to a Slurm cluster, look at them and end them."""

from __future__ import annotations

import json
import secrets
import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tandem.cli.slurm.setup import setup_command
from tandem.cli.slurm.show import show_connection, summary
from tandem.cli.slurm.site import JobArgument, SetOption, SiteOption
from tandem.cli.slurm.submit import submit_app
from tandem.cli.slurm.tunnel import tunnel_command
from tandem.cli.support.findings import Finding, show_findings
from tandem.cli.support.shell import friendly_errors
from tandem.cli.sweep import say_swept
from tandem.cluster.slurm import commands
from tandem.cluster.slurm.folder import JobFolder, find, folders
from tandem.cluster.slurm.script import container_words, exports, preparation, resource_options, source
from tandem.cluster.slurm.submission import tandem_words
from tandem.errors import ClusterError, ConfigError
from tandem.jobs.sweep import find_sweep
from tandem.sdk.console import console
from tandem.sdk.slurm import read_site
from tandem.settings import settings
from tandem.storage import write_atomic

POLL_S = 1.0
CHECK_S = 600.0
"""Seconds within which a compute node has to be free for a check."""

slurm_app = typer.Typer(no_args_is_help=True, help="Train and serve as jobs of a Slurm cluster.")
slurm_app.command("setup")(setup_command)
slurm_app.command("tunnel")(tunnel_command)
slurm_app.add_typer(submit_app, name="submit")


@slurm_app.command("check")
def check_command(
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs to ask for.")] = 0,
    site: SiteOption = None,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Check a compute node as jobs find it: its view of TANDEM_HOME, packages, GPUs, memory and ports."""
    with friendly_errors():
        found = read_site(site, overrides)
        home = settings().root
        token = home / "slurm" / f"check-{secrets.token_hex(4)}"
        environment = token.with_suffix(".sh")
        write_atomic(token, secrets.token_hex(8), mode=0o600)
        write_atomic(environment, "\n".join(exports(found, {"TANDEM_HOME": str(home)})) + "\n", mode=0o600)
        command = shlex.join([*tandem_words(found), "doctor", "--json"])
        if found.container is not None:
            command = " ".join([*container_words(found.container, home), command])
        path = shlex.quote(str(token))
        lines = [
            f"[ -e {path} ] || exit 0",
            *preparation(found, [source(environment)]),
            f"cat {path}; echo",
            f"{command} || true",
        ]
        try:
            with console.status("Waiting for a compute node"):
                options = ["--nodes=1", "--ntasks=1", "--time=10", *resource_options(found, gpus_per_node)]
                shown = commands.run_step(options, ["bash", "-c", "\n".join(lines)], timeout_s=CHECK_S)
            content, _, report = shown.partition("\n")
            if content.strip() != token.read_text():
                raise ClusterError(
                    f"The compute node does not see {home} of this machine. TANDEM_HOME must be on a shared file system."
                )
        finally:
            token.unlink(missing_ok=True)
            environment.unlink(missing_ok=True)
        raise SystemExit(show_findings(console, [Finding(**values) for values in json.loads(report)]))


@slurm_app.command("status")
def status_command(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the jobs of this home, newest first."""
    with friendly_errors():
        rows = [summary(folder) for folder in folders(settings().root)]
        if as_json:
            typer.echo(json.dumps(rows, indent=2))
            return
        if not rows:
            console.print("No Slurm job of this home yet. `tandem slurm submit serve MODEL` makes one.")
            return
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for column in ("JOB", "KIND", "SLURM", "STATE", "NODE", "ENDS"):
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(
                *(escape(str(row[key] or "-")) for key in ("job_id", "kind", "slurm", "state", "node", "ends_at"))
            )
        console.print(table)


@slurm_app.command("info")
def info_command(
    job: JobArgument = "latest", as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False
) -> None:
    """Show how to reach a job's app, with its key."""
    with friendly_errors():
        folder = find(settings().root, job)
        connection = folder.connection()
        if as_json:
            typer.echo(json.dumps(asdict(connection)))
            return
        show_connection(connection, folder)


@slurm_app.command("logs")
def logs_command(
    job: JobArgument = "latest",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
) -> None:
    """Print a job's output."""
    with friendly_errors():
        folder = single(find(settings().root, job))
        position = 0
        while True:
            if folder.log.exists():
                with folder.log.open() as log:
                    log.seek(position)
                    typer.echo(log.read(), nl=False)
                    position = log.tell()
            state = commands.state(folder.submission().job_id or "") if follow else None
            if state is None or state.is_over:
                return
            time.sleep(POLL_S)


@slurm_app.command("stop")
def stop_command(job: JobArgument) -> None:
    """End a job gently: an app ends its streams first, and training writes a checkpoint."""
    with friendly_errors():
        folder = find(settings().root, job)
        submission = folder.submission()
        runs = [each for number in submission.tasks or (0,) if (each := folder.task(number) if number else folder).runs]
        if not runs:
            raise ClusterError(f"Job {submission.job_id} does not run. `tandem slurm cancel` takes it from the queue.")
        for each in runs:
            each.stop()
        console.print(f"Job {submission.job_id} ends.")


@slurm_app.command("cancel")
def cancel_command(job: JobArgument) -> None:
    """End a job now; what it answers is cut. `tandem slurm stop` ends it gently."""
    with friendly_errors():
        folder = find(settings().root, job)
        commands.cancel(folder.submission().job_id or "")
        console.print(f"Job {folder.submission().job_id} is cancelled.")


@slurm_app.command("extend")
def extend_command(job: JobArgument, minutes: Annotated[int, typer.Option(min=1, help="Minutes to add.")] = 60) -> None:
    """Give a running job more time, where the site lets you."""
    with friendly_errors():
        folder = find(settings().root, job)
        commands.extend(folder.submission().job_id or "", minutes)
        # Imported here: the key store imports the database's libraries.
        from tandem.sdk.slurm_key import extend_key

        extend_key(folder.connection(), minutes)
        console.print(f"Job {folder.submission().job_id} has {minutes} minutes more.")


@slurm_app.command("collect")
def collect_command(job: JobArgument = "latest") -> None:
    """End a sweep whose trials are over: its last task does so, unless it was killed."""
    with friendly_errors():
        submission = find(settings().root, job).submission()
        sweep = find_sweep(submission.command[2]) if submission.kind == "sweep" else None
        if sweep is None:
            raise ConfigError(f"Job {submission.job_id} is no sweep.")
        from tandem.jobs.sweep_result import finish_if_over, waiting_trials

        if end := finish_if_over(sweep):
            say_swept(sweep, end)
            return
        waiting = ", ".join(map(str, waiting_trials(sweep)))
        raise ClusterError(
            f"Trials {waiting} of {sweep.id} are not over. Submit the sweep again to run what is missing."
        )


@slurm_app.command("trial", hidden=True)
def trial_command(
    sweep: Annotated[str, typer.Argument(help="The sweep's id.")],
    number: Annotated[int, typer.Argument(help="The trial's number, from 1.")],
) -> None:
    """Run one trial of a sweep; the tasks of an array call this."""
    with friendly_errors():
        from tandem.sdk.slurm_sweep import run_trial

        raise SystemExit(run_trial(sweep, number))


@slurm_app.command("attempt", hidden=True)
def attempt_command(job: Annotated[str, typer.Argument(help="The id of a job with a folder.")]) -> None:
    """Run a prepared job on the cluster at RAY_ADDRESS; Slurm jobs of the dispatcher call this."""
    with friendly_errors():
        from tandem.sdk.slurm_attempt import run_attempt

        raise SystemExit(run_attempt(job))


@slurm_app.command("node", hidden=True)
def node_command(folder: Annotated[Path, typer.Argument(help="The job's folder.")]) -> None:
    """Run one node of a job; the batch script calls this."""
    with friendly_errors():
        from tandem.sdk.slurm_node import run_node

        raise SystemExit(run_node(JobFolder(folder)))


def single(folder: JobFolder) -> JobFolder:
    """The folder, unless it is that of an array, whose tasks have folders of their own."""
    submission = folder.submission()
    if submission.tasks:
        job_id = submission.job_id
        raise ConfigError(
            f"Job {job_id} is an array. Name one of its {len(submission.tasks)} tasks, such as {job_id}_{submission.tasks[0]}."
        )
    return folder
