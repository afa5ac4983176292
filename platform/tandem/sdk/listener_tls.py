"""TLS of a cluster's public listener: set on a local cluster, compared on the nodes of others, which are started with it."""

from __future__ import annotations

from tandem.cluster.haproxy import node_folder
from tandem.cluster.local import Cluster, LocalCluster
from tandem.cluster.tls import absolute, check_files, from_settings, host_of, install, installed
from tandem.config import TlsConfig
from tandem.errors import ClusterError, ConfigError
from tandem.sdk.console import errors
from tandem.serve.listen import is_loopback

CHECK_S = 60.0
"""Seconds that the nodes may take to tell what their listeners have."""
WHERE = "Set TANDEM_TLS_CERTIFICATE and TANDEM_TLS_KEY where that node is started (deploy/tandem.env)"


def wanted_tls(given: TlsConfig | None) -> TlsConfig | None:
    """The files that a command or config gives, else those of the settings; ConfigError if they cannot be used."""
    tls = absolute(given) if given is not None else from_settings()
    if tls is not None:
        check_files(tls)
    return tls


def running_tls(cluster: Cluster | None) -> TlsConfig | None:
    """The files of the listener on a cluster; None: it has no TLS.

    Of a cluster that is neither local nor that of this process: those of the settings, which are the same on all nodes.
    """
    folder = cluster.folder if isinstance(cluster, LocalCluster) else node_folder()
    if folder is not None:
        return installed(folder)
    return None if cluster is None else from_settings()


def apply_tls(cluster: Cluster, tls: TlsConfig | None, *, serving: bool) -> None:
    """Have the listener on a connected cluster use these files; ClusterError if it cannot.

    `serving`: whether apps are up already. The listener of these stays as it is.
    """
    if isinstance(cluster, LocalCluster):
        if installed(cluster.folder) == tls:
            return
        if serving:
            raise ClusterError(
                f"The listener of this cluster has {_told(installed(cluster.folder))} until its other apps end, and listen.tls "
                f"asks for {_told(tls)}. Use the same, or run `tandem serve down` first."
            )
        install(cluster.folder, tls)
    elif tls is not None:
        _check_nodes(tls)


def warn_of_clear_keys(host: str, tls: TlsConfig | None) -> None:
    """Tell once, at start, that keys can be read on the way."""
    if tls is None and not is_loopback(host):
        errors.print(
            f"[yellow]Warning[/] The app listens on {host} without TLS: API keys travel in clear. Set listen.tls, or "
            "--tls-certificate and --tls-key.",
            soft_wrap=True,
        )


def url_host(host: str, tls: TlsConfig) -> str:
    """The host in the URL of a listener with TLS: one that its certificate is for."""
    try:
        return host_of(check_files(tls), host)
    except ConfigError:
        return host


def node_problem(tls: TlsConfig) -> str | None:
    """What keeps the node of this process from speaking TLS with these files; None: it does. Runs on each node."""
    folder = node_folder()
    if folder is None:
        return "was not started by `tandem node start`, so it has no HAProxy of Tandem's"
    found = installed(folder)
    return None if found == tls else f"has {_told(found)}"


def _check_nodes(tls: TlsConfig) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0)(node_problem)
    asked = {
        node["NodeManagerAddress"]: ask.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(tls)
        for node in ray.nodes()
        if node["Alive"]
    }
    for address, answer in asked.items():
        if problem := ray.get(answer, timeout=CHECK_S):
            raise ClusterError(f"listen.tls asks for {_told(tls)}, and the node {address} {problem}. {WHERE}.")


def _told(tls: TlsConfig | None) -> str:
    return "no TLS" if tls is None else f"TLS with {tls.certificate}"
