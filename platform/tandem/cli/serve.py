"""`tandem serve`: start, change, inspect and stop an app on a cluster."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from tandem.cli.support.shell import friendly_errors
from tandem.cluster.local import Cluster, LocalCluster, connect
from tandem.config import ServeConfig, ServedModelConfig, TlsConfig, located
from tandem.config.load import apply_overrides, from_dict, read_yaml, to_dict
from tandem.engine.engines import check_engine_name
from tandem.errors import ClusterError, ConfigError
from tandem.sdk.cluster import check_gpus, connected, open_cluster, stop_quietly
from tandem.sdk.console import console, print_message
from tandem.sdk.serving import (
    CPUS,
    applications,
    busy,
    check_cluster,
    check_listener,
    check_not_served,
    listener,
    listener_url,
    serve_details,
    served_models,
    serving,
)

serve_app = typer.Typer(no_args_is_help=True, help="Serve models and adapters behind one OpenAI endpoint.")


@serve_app.command("up")
def up_command(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Registered models, folders, or ORG/NAME of the hub. None: the newest one."),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="The app as YAML (see serve_apps).")] = None,
    overrides: Annotated[list[str], typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one value.")] = [],  # noqa: B006
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; listen.host of the config, or 127.0.0.1.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port to listen on; listen.port of the config, TANDEM_PORT or 8000."),
    ] = None,
    tls_certificate: Annotated[
        Path | None,
        typer.Option(help="Certificate for TLS (PEM); listen.tls of the config, or TANDEM_TLS_CERTIFICATE."),
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM), readable by you alone.")] = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when it is up; `tandem serve down` ends it.")
    ] = False,
) -> None:
    """Serve models until Ctrl-C; after a SIGTERM, until what has begun is answered."""
    with friendly_errors(), located(config, overrides):
        app_config = read_config(models, config, overrides)
        if (known := connect()) is not None:
            check_not_served(serve_details(known), app_config, known)
        check_gpus(sum(each.gpus_per_replica for each in app_config.models), "The app", "models[].gpus_per_replica")
        listen = listener(app_config, host, port, tls_files(tls_certificate, tls_key))
        with (
            open_cluster(num_cpus=CPUS, keep=detach) as cluster,
            serving(cluster, app_config, listen, keep=detach) as url,
        ):
            console.print(f"Serving at [bold]{url}[/]." + ("" if detach else " Ctrl-C ends it."))
            if not detach and wait_for_interrupt() == signal.SIGTERM:
                end_gently(app_config)


@serve_app.command("deploy")
def deploy_command(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Registered models, folders, or ORG/NAME of the hub. None: those that are served now."),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="The app as YAML (see serve_apps).")] = None,
    overrides: Annotated[list[str], typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one value.")] = [],  # noqa: B006
) -> None:
    """Change what is served: other settings, versions or models, without a failed request.

    With neither models nor a config, --set changes values of the app that runs, and all else stays.
    """
    with friendly_errors(), located(config, overrides):
        app_config = read_config(models, config, overrides)
        cluster = _required_cluster()
        if app_config.app not in applications(cluster):
            raise ClusterError(f"{app_config.app} is not served on this cluster. `tandem serve up` starts it.")
        check_listener(serve_details(cluster), app_config.listen, cluster)
        with connected(cluster):
            from tandem.apps.build import prepare
            from tandem.apps.deploy import deploy, saved_config

            if not models and config is None:
                running = saved_config(app_config.app)
                if running is None:
                    raise ClusterError(
                        f"How {app_config.app} was started is not known: not by `tandem serve`, or by an older one. Name its "
                        "models, or give --config."
                    )
                app_config = from_dict(ServeConfig, apply_overrides(to_dict(running), overrides))
            # Before the status line: a model that is downloaded has a progress bar of its own.
            planned = prepare(app_config)
            check_cluster(cluster, planned)
            with console.status(f"Changing {app_config.app}: what runs answers until what is new does"):
                deploy(planned, on_message=print_message)
        console.print(f"{app_config.app} is changed. What had begun before ends on the replicas that it began on.")


def read_config(models: list[str] | None, config: Path | None, overrides: list[str]) -> ServeConfig:
    """The app as a command line describes it."""
    values = apply_overrides(read_yaml(config) if config else {}, overrides)
    app_config = from_dict(ServeConfig, values)
    if models:
        app_config = replace(app_config, models=tuple(ServedModelConfig(model=name) for name in models))
    elif values.get("models") == []:
        raise ConfigError(
            "models is empty. Name at least one model, or leave it out to serve the newest registered one."
        )
    for number, served in enumerate(app_config.models):
        # Before a cluster is started.
        check_engine_name(served.engine, f"models[{number}].engine")
    return app_config


def tls_files(certificate: Path | None, key: Path | None) -> TlsConfig | None:
    """The files that a command line names; ConfigError for one without the other."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ConfigError("--tls-certificate and --tls-key belong together; only one of them is given.")
    return TlsConfig(certificate=str(certificate), key=str(key))


def end_gently(config: ServeConfig) -> None:
    """Take an app away when its streams have ended, or after its `drain_timeout_s`."""
    from tandem.apps.deploy import drain

    console.print(f"SIGTERM: {config.app} takes nothing new, and ends when its streams have.")
    if not drain(config.app, config.drain_timeout_s):
        console.print(f"After {config.drain_timeout_s:g} s some had not; they are cut.")


@serve_app.command("status")
def status_command(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Show the served apps, their deployments and replicas."""
    with friendly_errors():
        cluster = _required_cluster()
        details = serve_details(cluster)
        apps = details.get("applications", {})
        addresses = {
            name: {"url": listener_url(details, cluster), "models": served_models(details, name)} for name in apps
        }
        if as_json:
            typer.echo(
                json.dumps({name: {**app, **addresses[name]} for name, app in apps.items()}, indent=2, default=str)
            )
            return
        show_status(apps)
        for name, address in addresses.items():
            models = ", ".join(address["models"]) or "none yet"
            console.print(
                f"[bold]{escape(name)}[/]: {address['url']}, models: {escape(models)}, and the adapters of these",
                soft_wrap=True,
            )


def show_status(apps: Mapping[str, Any]) -> None:
    """Print apps and their deployments as a table, and below it each message whole."""
    if not apps:
        console.print("Nothing is served on this cluster.")
        return
    from tandem.apps.deploy import reason_in

    table = Table(box=None, header_style="bold")
    for column in ("app", "deployment", "state", "replicas"):
        table.add_column(column, overflow="fold")
    messages = []
    for name, app in apps.items():
        for deployment, details in app["deployments"].items():
            states = [replica["state"] for replica in details["replicas"]]
            running = f"{states.count('RUNNING')}/{details.get('target_num_replicas') or len(states)}"
            table.add_row(name, deployment, details["status"], running)
            messages.append((deployment, details.get("message", "")))
        if not app["deployments"]:
            table.add_row(name, "", app["status"], "")
            messages.append((name, app.get("message", "")))
    console.print(table)
    for what, message in messages:
        if message:
            console.print(f"[bold]{escape(what)}[/]: {escape(reason_in(message))}", soft_wrap=True)


@serve_app.command("down")
def down_command() -> None:
    """Stop serving; a local cluster that has nothing else to do is stopped with it."""
    with friendly_errors():
        cluster = _required_cluster()
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

        names = list(applications(cluster))
        if isinstance(cluster, LocalCluster) and not busy(cluster):
            stop_quietly(cluster)
        else:
            ServeSubmissionClient(cluster.dashboard_url).delete_applications()
        console.print(f"Stopped {', '.join(names) or 'the cluster; nothing was served'}.")


def _required_cluster() -> Cluster:
    cluster = connect()
    if cluster is None:
        raise ClusterError(
            "Nothing is up: no cluster in this home, and RAY_ADDRESS is not set. `tandem serve up` starts one."
        )
    return cluster


def wait_for_interrupt() -> int:
    """Return at a Ctrl-C or a SIGTERM, with the signal's number; the next one leaves in the usual way."""
    event = threading.Event()
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        event.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        # A wait without end would not let signals through.
        while not event.wait(0.5):
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    console.print()
    return came[0]
