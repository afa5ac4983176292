"""`tandem serve`: bring the app up on a cluster, look at it, take it down."""

from __future__ import annotations

import errno
import json
import logging
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.markup import escape
from rich.table import Table

from tandem.cli.machine import port_holder
from tandem.cli.shell import a_cluster, connected, console, friendly_errors, stop_quietly, uninterrupted
from tandem.cluster import Cluster, LocalCluster, connect
from tandem.config import ListenConfig, ServeConfig, ServedModelConfig, load_yaml, located
from tandem.config.load import apply_overrides, from_dict, to_dict
from tandem.errors import ClusterError
from tandem.settings import settings

serve_app = typer.Typer(no_args_is_help=True, help="Serve models and adapters behind one OpenAI endpoint.")

CPUS = 8
WILDCARDS = ("0.0.0.0", "::", "*")
"""Addresses that mean all of a machine's."""


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
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when it is up; `tandem serve down` ends it.")
    ] = False,
) -> None:
    """Serve models until Ctrl-C; after a SIGTERM, until what has begun is answered."""
    with friendly_errors(), located(config, overrides):
        wanted = read_config(models, config, overrides)
        if (known := connect()) is not None:
            check_not_served(serve_details(known), wanted)
        listen = listener(wanted, host, port)
        with (
            a_cluster(num_cpus=CPUS, keep=detach) as cluster,
            serving(cluster, wanted, listen, keep=detach) as url,
        ):
            console.print(f"Serving at [bold]{url}[/]." + ("" if detach else " Ctrl-C ends it."))
            if not detach and wait_for_interrupt() == signal.SIGTERM:
                end_gently(wanted)


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
        wanted = read_config(models, config, overrides)
        cluster = _required_cluster()
        if wanted.app not in applications(cluster):
            raise ClusterError(f"{wanted.app} is not served on this cluster. `tandem serve up` starts it.")
        check_listener(serve_details(cluster), wanted.listen)
        with serve_quietly(cluster):
            from tandem.serve.app import build_pinned
            from tandem.serve.deploy import deploy, remember, remembered

            if not models and config is None:
                running = remembered(wanted.app)
                if running is None:
                    raise ClusterError(
                        f"How {wanted.app} was started is not known: not by `tandem serve`, or by an older one. Name its "
                        "models, or give --config."
                    )
                wanted = from_dict(ServeConfig, apply_overrides(to_dict(running), overrides))
            # A model that is downloaded has a bar of its own.
            app, wanted = build_pinned(wanted)
            with console.status(f"Changing {wanted.app}: what runs answers until what is new does"):
                deploy(app, wanted.app, tell=_tell)
            remember(wanted)
        console.print(f"{wanted.app} is changed. What had begun before ends on the replicas that it began on.")


def listener(config: ServeConfig, host: str | None = None, port: int | None = None) -> ListenConfig:
    """Where an app is to listen: what the command line says, else the config, else the settings.

    ClusterError if the port is taken on this machine.
    """
    number = port or config.listen.port or settings().port
    listen = replace(config.listen, host=host or config.listen.host, port=number)
    check_port(number, listen.host)
    return listen


def read_config(models: list[str] | None, config: Path | None, overrides: list[str]) -> ServeConfig:
    """The app as a command line describes it."""
    wanted = (
        load_yaml(ServeConfig, config, overrides) if config else from_dict(ServeConfig, apply_overrides({}, overrides))
    )
    return replace(wanted, models=tuple(ServedModelConfig(model=name) for name in models)) if models else wanted


def end_gently(config: ServeConfig) -> None:
    """Take an app away when its streams have ended, or after its `drain_timeout_s`."""
    from tandem.serve.deploy import drain

    console.print(f"SIGTERM: {config.app} takes nothing new, and ends when its streams have.")
    if not drain(config.app, config.drain_timeout_s):
        console.print(f"After {config.drain_timeout_s:g} s some had not; they are cut.")


@contextmanager
def serve_quietly(cluster: Cluster) -> Iterator[None]:
    """This process connected to a cluster for the length of a block, and Serve's informational messages not shown."""
    other = f"use `serve deploy -a {cluster.dashboard_url} serve_apps/openai.yaml`"
    quiet_serve()
    with connected(cluster, other=other):
        yield


def quiet_serve() -> None:
    """Keep Serve's informational messages out of the terminal."""
    # Its logger is configured when it is imported: what was set before is lost.
    from ray import serve  # noqa: F401

    logging.getLogger("ray.serve").setLevel(logging.WARNING)


@contextmanager
def serving(cluster: Cluster, config: ServeConfig, listen: ListenConfig, *, keep: bool = False) -> Iterator[str]:
    """The app on `cluster` for the length of a block (longer with `keep`); yields its URL once every model answers."""
    from ray import serve

    from tandem.serve.app import build_pinned
    from tandem.serve.deploy import deploy, remember

    details = serve_details(cluster)
    check_not_served(details, config)
    port = listen.port or settings().port
    taken = (details.get("http_options") or {}).get("port", port)
    if details.get("applications") and taken != port:
        raise ClusterError(
            f"Serve listens on port {taken} on this cluster, for other apps. Use it too: --port {taken}."
        )
    with serve_quietly(cluster):
        # Here, not before: whether the registry may be used depends on the cluster's nodes.
        app, config = build_pinned(config)
        try:
            with console.status(f"Starting {config.app}: one engine takes about half a minute"):
                serve.start(
                    proxy_location="HeadOnly" if listen.nodes == "head" else "EveryNode",
                    http_options={"host": listen.host, "port": port},
                )
                deploy(app, config.app, tell=_tell)
                remember(config)
            yield url_of(listen.host, port)
        finally:
            with uninterrupted():
                # A cluster of our own ends as a whole a moment later, and much faster.
                if not keep and not cluster.owned:
                    serve.delete(config.app)
                    if not serve.status().applications:
                        serve.shutdown()  # its port is free again


@serve_app.command("status")
def status_command(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Show the served apps, their deployments and replicas."""
    with friendly_errors():
        found = applications(_required_cluster())
        if as_json:
            typer.echo(json.dumps(found, indent=2, default=str))
            return
        show_status(found)


def show_status(found: Mapping[str, Any]) -> None:
    """Print apps and their deployments as a table, and below it each message whole."""
    if not found:
        console.print("Nothing is served on this cluster.")
        return
    from tandem.serve.deploy import reason_in

    table = Table(box=None, header_style="bold")
    for column in ("app", "deployment", "state", "replicas"):
        table.add_column(column, overflow="fold")
    messages = []
    for name, app in found.items():
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


def busy(cluster: Cluster) -> bool:
    """Whether a job runs on the cluster."""
    from tandem.jobs.client import JobClient

    return JobClient(cluster).busy()


def applications(cluster: Cluster) -> dict[str, Any]:
    """The apps on a cluster."""
    return dict(serve_details(cluster).get("applications", {}))


def serve_details(cluster: Cluster) -> dict[str, Any]:
    """What runs on a cluster, as Serve's own REST API tells it."""
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    return dict(ServeSubmissionClient(cluster.dashboard_url).get_serve_details())


def check_not_served(details: dict[str, Any], config: ServeConfig) -> None:
    """Refuse an app that is up, with what changes it; `details` are of `serve_details`."""
    if config.app in details.get("applications", {}):
        raise ClusterError(
            f"{config.app} is served on this cluster already. `tandem serve deploy` changes it, `tandem serve down` ends it; "
            "its adapters need no restart."
        )


def check_listener(details: dict[str, Any], listen: ListenConfig) -> None:
    """Refuse another listener than the one that Serve has: it opens its listener when it starts, and keeps it."""
    running = details.get("http_options") or {}
    for key in ("host", "port"):
        wanted, has = getattr(listen, key), running.get(key)
        if wanted != getattr(ListenConfig(), key) and has is not None and wanted != has:
            raise ClusterError(
                f"listen.{key} is {wanted!r}, and Serve listens on {running.get('host')}:{running.get('port')} until it ends. "
                "Leave it out, or run `tandem serve down` and `tandem serve up`."
            )


def app_url(cluster: Cluster, app: str) -> str | None:
    """The base URL, for clients of OpenAI's API, of an app that is up on a cluster; None if it is not."""
    details = serve_details(cluster)
    if app not in details.get("applications", {}):
        return None
    options = details["http_options"]
    host = options.get("host") or "127.0.0.1"
    if host in WILDCARDS:
        host = urlsplit(cluster.dashboard_url).hostname or "127.0.0.1"
    return url_of(host, options["port"])


def url_of(host: str, port: int) -> str:
    """The base URL, for clients of OpenAI's API, of a listener."""
    host = "127.0.0.1" if host in WILDCARDS else host
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _tell(text: str) -> None:
    console.print(escape(text), soft_wrap=True)


def _required_cluster() -> Cluster:
    cluster = connect()
    if cluster is None:
        raise ClusterError(
            "Nothing is up: no cluster in this home, and RAY_ADDRESS is not set. `tandem serve up` starts one."
        )
    return cluster


def check_port(port: int, host: str = "127.0.0.1") -> None:
    """Refuse a port that is taken, with the process that holds it, and an address that this machine does not have."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    except socket.gaierror as error:
        raise ClusterError(
            f"{host} is no address to listen on ({error.strerror}). Use 127.0.0.1, or 0.0.0.0 for all."
        ) from error
    with closing(socket.socket(family)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return
        except PermissionError as error:
            raise ClusterError(
                f"Port {port} may not be used by this user. Choose one above 1023: --port 8000."
            ) from error
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise ClusterError(
                    f"{host} is no address of this machine, so nothing can listen on it. Use 127.0.0.1, or 0.0.0.0 for all."
                ) from error
            with closing(socket.socket(family)) as other:
                other.bind((host, 0))
                free = other.getsockname()[1]
            holder = port_holder(port) or "a process that has just ended"
            raise ClusterError(
                f"Port {port} is taken by {holder}. Stop that, or choose another: --port {free}."
            ) from error


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
