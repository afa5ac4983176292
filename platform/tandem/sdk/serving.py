"""Serve applications of a cluster: start, inspect and stop one, and check its listener."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tandem.auth import KeyStore
from tandem.cluster.dashboard import ask_dashboard
from tandem.cluster.local import Cluster
from tandem.cluster.machine import port_holder
from tandem.cluster.tls import absolute
from tandem.config import ListenConfig, ServeConfig, TlsConfig
from tandem.errors import ClusterError
from tandem.routing.records import model_of_deployment
from tandem.sdk.cluster import connected, uninterrupted
from tandem.sdk.console import console, print_message
from tandem.sdk.listener_tls import apply_tls, running_tls, url_host, wanted_tls, warn_of_clear_keys
from tandem.serve.listen import is_loopback
from tandem.settings import settings

if TYPE_CHECKING:
    from tandem.apps.plan import AppPlan

CPUS = 8
"""Logical CPUs of a local cluster."""
WILDCARDS = ("0.0.0.0", "::", "*")  # noqa: S104 - compared with, not bound to
"""Addresses that mean all of a machine's."""


def listener(
    config: ServeConfig, host: str | None = None, port: int | None = None, tls: TlsConfig | None = None
) -> ListenConfig:
    """Where an app is to listen: what the command line says, else the config, else the settings.

    ConfigError if the files for TLS cannot be used, ClusterError if the port is taken on this machine, or if other machines could
    reach an app that has no API key.
    """
    number = port or config.listen.port or settings().port
    files = wanted_tls(tls or config.listen.tls)
    listen = replace(config.listen, host=host or config.listen.host, port=number, tls=files)
    check_keys([listen.host], config)
    check_port(number, listen.host)
    return listen


def check_keys(addresses: Iterable[str], config: ServeConfig) -> None:
    """Refuse to listen where other machines reach an app that has neither an API key nor a provider of tokens.

    It would answer nobody.
    """
    exposed = sorted({each for each in addresses if not is_loopback(each)})
    if config.gateway.oidc is not None or settings().admin_token:
        return
    if exposed and not KeyStore.open().count_active():
        raise ClusterError(
            f"The app would listen on {', '.join(exposed[:5])}, where other machines reach it, and there is no API key yet. Make "
            "one with `tandem keys create NAME`."
        )


def check_cluster(cluster: Cluster, planned: AppPlan) -> None:
    """Refuse an app that no node of a local cluster could hold; say what nodes of another cluster lack for serving."""
    from tandem.apps.build import missing_on_nodes
    from tandem.apps.deploy import check_capacity

    if cluster.local:
        check_capacity(planned)
        return
    for text in missing_on_nodes(planned):
        print_message(text)


@contextmanager
def serving(cluster: Cluster, config: ServeConfig, listen: ListenConfig, *, keep: bool = False) -> Iterator[str]:
    """The app on `cluster` for the length of a block (longer with `keep`); yields its URL once every model answers."""
    import ray
    from ray import serve

    from tandem.apps.build import prepare
    from tandem.apps.deploy import deploy

    details = serve_details(cluster)
    check_not_served(details, config, cluster)
    port = listen.port or settings().port
    taken = (details.get("http_options") or {}).get("port", port)
    if details.get("applications") and taken != port:
        raise ClusterError(
            f"Serve listens on port {taken} on this cluster, for other apps. Use it too: --port {taken}."
        )
    with connected(cluster):
        # Gateways listen on their nodes' addresses, too.
        check_keys((node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]), config)
        apply_tls(cluster, listen.tls, serving=bool(details.get("applications")))
        warn_of_clear_keys(listen.host, listen.tls)
        # Here, not before: whether the registry may be used depends on the cluster's nodes.
        planned = prepare(config)
        check_cluster(cluster, planned)
        try:
            with console.status(f"Starting {config.app}: one engine takes about half a minute"):
                serve.start(
                    proxy_location="HeadOnly" if listen.nodes == "head" else "EveryNode",
                    http_options={"host": listen.host, "port": port},
                )
                deploy(planned, on_message=print_message)
            yield url_of(listen.host, port, listen.tls)
        finally:
            with uninterrupted():
                # A cluster of our own ends as a whole a moment later, and much faster.
                if not keep and not cluster.owned:
                    serve.delete(config.app)
                    if not serve.status().applications:
                        serve.shutdown()  # its port is free again


def busy(cluster: Cluster) -> bool:
    """Whether a job runs on the cluster."""
    from tandem.jobs.client import JobClient

    return JobClient(cluster).busy()


def applications(cluster: Cluster) -> dict[str, Any]:
    """The apps on a cluster."""
    return dict(serve_details(cluster).get("applications", {}))


def serve_details(cluster: Cluster) -> dict[str, Any]:
    """What runs on a cluster, as Serve's own REST API tells it; ClusterError if the dashboard does not answer."""
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    return dict(
        ask_dashboard(cluster.dashboard_url, lambda: ServeSubmissionClient(cluster.dashboard_url).get_serve_details())
    )


def check_not_served(details: dict[str, Any], config: ServeConfig, cluster: Cluster | None = None) -> None:
    """Refuse an app that is up, with what changes it; `details` are of `serve_details`."""
    if config.app in details.get("applications", {}):
        models = ", ".join(served_models(details, config.app)) or "no model yet"
        raise ClusterError(
            f"{config.app} is served on this cluster already, at {listener_url(details, cluster)}, with {models}. "
            "`tandem serve deploy MODEL` changes its models, `tandem serve deploy --set KEY=VALUE` its settings, and "
            "`tandem serve down` ends it. New adapters of its models need none of these."
        )


def check_listener(details: dict[str, Any], listen: ListenConfig, cluster: Cluster | None = None) -> None:
    """Refuse another listener than the one that Serve has: it opens its listener when it starts, and keeps it."""
    if listen.tls is not None and cluster is not None and absolute(listen.tls) != running_tls(cluster):
        raise ClusterError(
            "listen.tls is not what Serve listens with until it ends. Leave it out, or run `tandem serve down` and `tandem serve "
            "up`. Renewed files at the same paths are taken up without that."
        )
    running = details.get("http_options") or {}
    for key in ("host", "port"):
        wanted, has = getattr(listen, key), running.get(key)
        if wanted != getattr(ListenConfig(), key) and has is not None and wanted != has:
            raise ClusterError(
                f"listen.{key} is {wanted!r}, and Serve listens on {running.get('host')}:{running.get('port')} until it ends. "
                "Leave it out, or run `tandem serve down` and `tandem serve up`."
            )


def served_models(details: dict[str, Any], app: str) -> list[str]:
    """The names of an app's models, by its deployments."""
    deployments = details.get("applications", {}).get(app, {}).get("deployments", {})
    return [name for name in map(model_of_deployment, deployments) if name is not None]


def app_url(cluster: Cluster, app: str) -> str | None:
    """The base URL, for clients of OpenAI's API, of an app that is up on a cluster; None if it is not."""
    details = serve_details(cluster)
    if app not in details.get("applications", {}):
        return None
    return listener_url(details, cluster)


def listener_url(details: dict[str, Any], cluster: Cluster | None = None) -> str:
    """The base URL, for clients of OpenAI's API, of the listener in `serve_details`.

    A listener on all addresses is named by the host of `cluster`'s dashboard, or by this machine's loopback address.
    """
    options = details.get("http_options") or {}
    host = options.get("host") or "127.0.0.1"
    if host in WILDCARDS and cluster is not None:
        host = urlsplit(cluster.dashboard_url).hostname or "127.0.0.1"
    return url_of(host, options.get("port") or settings().port, running_tls(cluster))


def url_of(host: str, port: int, tls: TlsConfig | None = None) -> str:
    """The base URL, for clients of OpenAI's API, of a listener."""
    host = "127.0.0.1" if host in WILDCARDS else host
    if tls is not None:
        host = url_host(host, tls)
    return f"{'http' if tls is None else 'https'}://{f'[{host}]' if ':' in host else host}:{port}/v1"


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
