"""`tandem slurm`: submit jobs to a Slurm cluster, look at them and end them."""

from __future__ import annotations

import json
import secrets
import shlex
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from tandem.cli.slurm.site import JobArgument, SetOption, SiteOption, read_site
from tandem.cli.slurm.tunnel import tunnel_command
from tandem.cli.support.findings import Finding, show_findings
from tandem.cli.support.shell import friendly_errors
from tandem.cluster.slurm import commands
from tandem.cluster.slurm.folder import Connection, JobFolder, Submission, find, folders
from tandem.cluster.slurm.script import JobRequest, container_words, preparation, render, resource_options
from tandem.config.slurm import SlurmSite
from tandem.errors import ClusterError, ConfigError
from tandem.sdk.console import console
from tandem.settings import settings, variable
from tandem.storage import write_atomic

POLL_S = 1.0
CHECK_S = 600.0
"""Seconds within which a compute node has to be free for a check."""

slurm_app = typer.Typer(no_args_is_help=True, help="Train and serve as jobs of a Slurm cluster.")
slurm_app.command("tunnel")(tunnel_command)
submit_app = typer.Typer(no_args_is_help=True, help="Submit a job.")
slurm_app.add_typer(submit_app, name="submit")


@submit_app.command("serve", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def serve_command(
    context: typer.Context,
    nodes: Annotated[int, typer.Option("--nodes", "-N", min=1, help="Number of nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs on each node.")] = 0,
    port: Annotated[int, typer.Option(min=1024, max=65535, help="The app's port on its node.")] = 8000,
    successor_of: Annotated[
        str | None, typer.Option(metavar="JOB", help="A job whose tunnels lead to this one once it answers.")
    ] = None,
    site: SiteOption = None,
    overrides: SetOption = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script and submit nothing.")] = False,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once it is submitted.")] = False,
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
    nodes: Annotated[int, typer.Option("--nodes", "-N", min=1, help="Number of nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs on each node.")] = 0,
    site: SiteOption = None,
    overrides: SetOption = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script and submit nothing.")] = False,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once it is submitted.")] = False,
) -> None:
    """Train as a job: `tandem slurm submit train --config FILE`. All else is passed on to `tandem train submit`.

    Before the time limit it writes a checkpoint and is queued again, until it is done.
    """
    with friendly_errors():
        command = ("train", "submit", *context.args)
        submission = Submission(kind="train", command=command, nodes=nodes, gpus_per_node=gpus_per_node)
        _submit(submission, read_site(site, overrides), dry_run=dry_run, detach=detach)


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
        write_atomic(token, secrets.token_hex(8), mode=0o600)
        words = [sys.executable, "-m", "tandem", "doctor", "--json"]
        command = shlex.join(words)
        if found.container is not None:
            command = " ".join([*container_words(found.container, home), command])
        lines = [
            *preparation(found, {"TANDEM_HOME": str(home)}),
            f"cat {shlex.quote(str(token))}; echo",
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
        raise SystemExit(show_findings(console, [Finding(**values) for values in json.loads(report)]))


@slurm_app.command("status")
def status_command(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the jobs of this home, newest first."""
    with friendly_errors():
        rows = [_summary(folder) for folder in folders(settings().root)]
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
        _show_connection(connection, folder)


@slurm_app.command("logs")
def logs_command(
    job: JobArgument = "latest",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
) -> None:
    """Print a job's output."""
    with friendly_errors():
        folder = find(settings().root, job)
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
        head = folder.head()
        if head is None or not head.address:
            raise ClusterError(
                f"Job {folder.submission().job_id} does not run. `tandem slurm cancel` takes it from the queue."
            )
        folder.stop(head.run)
        console.print(f"Job {folder.submission().job_id} ends.")


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
        console.print(f"Job {folder.submission().job_id} has {minutes} minutes more.")


@slurm_app.command("node", hidden=True)
def node_command(folder: Annotated[Path, typer.Argument(help="The job's folder.")]) -> None:
    """Run one node of a job; the batch script calls this."""
    with friendly_errors():
        from tandem.sdk.slurm_node import run_node

        raise SystemExit(run_node(JobFolder(folder)))


def _submit(submission: Submission, site: SlurmSite, *, dry_run: bool, detach: bool) -> None:
    home = settings().root
    if any(character.isspace() for character in str(home)):
        raise ConfigError(f"TANDEM_HOME is {str(home)!r}; for Slurm its path must be without spaces.")
    if not dry_run:
        commands.require()
    folder = JobFolder(home / "slurm" / "example") if dry_run else JobFolder.create(home, submission)
    script = render(site, _request(submission, folder))
    if dry_run:
        typer.echo(script, nl=False)
        return
    folder.script.write_text(script)
    try:
        job_id = commands.submit(folder.script)
    except ClusterError:
        shutil.rmtree(folder.path)
        raise
    folder.write_submission(replace(folder.submission(), job_id=job_id))
    console.print(f"Job {job_id} is submitted. Its script and output are in {escape(str(folder.path))}.")
    if not detach:
        _wait(folder, job_id)


def _request(submission: Submission, folder: JobFolder) -> JobRequest:
    found = settings()
    variables = {
        "TANDEM_HOME": str(found.root),
        # One for each job: nodes may be shared.
        "TANDEM_RUNTIME_DIR": f"/tmp/ts-{folder.name[-6:]}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder.token),
        # Workers notice within this many seconds that the head has gone. The default, 60, would keep the allocation for a minute.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
        "OMP_NUM_THREADS": variable("OMP_NUM_THREADS") or "1",
    }
    if found.database_url:
        variables["TANDEM_DATABASE_URL"] = found.database_url
    return JobRequest(
        submission=submission,
        folder=folder,
        tandem=(sys.executable, "-m", "tandem"),
        variables=variables,
        home=found.root,
    )


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
    _show_connection(connection, folder)


def _show_connection(connection: Connection, folder: JobFolder) -> None:
    """Print how to reach a job's app; its key, on a terminal only by the file that holds it."""
    job_id = connection.job_id
    console.print(
        f"Job {job_id} is {connection.state}." + (f" {escape(connection.message)}" if connection.message else "")
    )
    if not connection.node or folder.submission().kind != "serve":
        return
    console.print(f"  URL on the cluster   http://{connection.node}:{connection.port}/v1", soft_wrap=True)
    console.print(f"  Models               {escape(', '.join(connection.models))}", soft_wrap=True)
    console.print(f"  Ends                 {connection.ends_at or 'not known'}")
    console.print(
        f"  API key              `tandem slurm info {job_id} --json` prints it; {escape(str(folder.path))}/connection.json",
        soft_wrap=True,
    )
    console.print(f"  From your machine    tandem slurm tunnel {job_id}", soft_wrap=True)


def _summary(folder: JobFolder) -> dict[str, Any]:
    submission, connection = folder.submission(), folder.connection()
    state = commands.state(submission.job_id) if submission.job_id and commands.available() else None
    return {
        "job_id": submission.job_id,
        "kind": submission.kind,
        "nodes": submission.nodes,
        "submitted_at": submission.submitted_at,
        "slurm": state.state if state else None,
        "state": connection.state,
        "node": connection.node,
        "ends_at": connection.ends_at,
        "folder": str(folder.path),
    }
